"""Heads that read ahead into another process: real processes against the same run in one process."""

import json
import os
import re
import signal

import pytest
import torch
from safetensors.torch import load_file

from localprop.report.results import read_results
from ranks import CALM, MODULES, assert_same_run, flags, wait_for_step

pytestmark = [pytest.mark.processes, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


def reaching(output, modules, reach, *more):
    return flags(output, modules, "--reach", str(reach), *more)


# In four modules the last has no block: the third's head reads its own output.
@pytest.mark.parametrize(
    ("modules", "processes", "reach", "more"),
    [
        (2, 2, 1, ["--micro-batches", "4", "--kinetic", "0.1", "--epochs", "1"]),
        (4, 4, 2, ["--method", "greedy", "--amp", "--amp-dtype", "bfloat16", "--epochs", "1"]),
        (3, 2, 2, ["--micro-batches", "2", "--epochs", "1"]),
    ],
)
def test_heads_read_ahead_into_another_process_with_the_same_bits(
    forker, alone, tmp_path, modules, processes, reach, more
):
    ranks = forker.train(tmp_path, processes, *reaching(tmp_path, modules, reach, *more))
    assert ranks.wait() == [0] * processes, ranks.log.read_text()
    assert ranks.log.read_text() == ""
    assert_same_run(tmp_path, alone(modules, "--reach", str(reach), *more))
    for row in read_results(tmp_path / "run" / "results.csv"):
        if "--amp" not in more:  # of so small a network, the casts are not predicted to a hundredth
            assert row.peak_memory == pytest.approx(row.predicted_memory, rel=0.01)


def test_a_run_whose_heads_read_ahead_is_resumed_in_other_layouts_with_the_same_bits(forker, alone, tmp_path):
    epochs, resume = ["--epochs", "3"], ["--resume", str(tmp_path / "run")]
    ranks = forker.train(tmp_path, 2, *reaching(tmp_path, 3, 1, *epochs, "--trace"))
    wait_for_step(tmp_path, 5)
    ranks.kill(1, signal.SIGTERM)  # its word travels back to the first
    assert ranks.wait() == [143, 143], ranks.log.read_text()
    spans = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    kinds = [{span["cat"] for span in spans if span.get("cat") and span["tid"] == rank} for rank in (0, 1)]
    assert ("gradient" in kinds[0], "gradient" in kinds[1]) == (True, False)
    assert ("back" in kinds[0], "back" in kinds[1]) == (False, True)
    first = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    ranks = forker.train(tmp_path, 1, *resume, "--steps", str(int(first.name[5:]) + 2))
    assert ranks.wait() == [0], ranks.log.read_text()
    ranks = forker.train(tmp_path, 3, *resume)
    assert ranks.wait() == [0, 0, 0], ranks.log.read_text()
    assert_same_run(tmp_path, alone(3, "--reach", "1", *epochs))


def test_replicas_whose_heads_read_ahead_agree_with_the_whole_batch(forker, tmp_path):
    settings = [*CALM, "--cuts", *MODULES[2], "--reach", "1", "--micro-batches", "2", "--experiment", "run"]
    runs = {count: tmp_path / str(count) for count in (1, 4)}
    for count, folder in runs.items():
        folder.mkdir()
        ranks = forker.train(folder, count, *settings, "--output", str(folder))
        assert ranks.wait() == [0] * count, ranks.log.read_text()
    one, several = (load_file(folder / "run" / "model.safetensors") for folder in runs.values())
    for name, value in one.items():
        assert torch.allclose(several[name], value, rtol=1e-5, atol=1e-7), name
    (a,), (b,) = (read_results(folder / "run" / "results.csv") for folder in runs.values())
    assert b.train_losses == pytest.approx(a.train_losses, rel=1e-5)
    assert b.heads == pytest.approx(a.heads)
    assert b.peak_memory == pytest.approx(b.predicted_memory, rel=0.01)


def test_what_is_not_finite_in_a_head_that_reads_ahead_is_one_line(forker, tmp_path):
    settings = [*reaching(tmp_path, 2, 1, "--epochs", "2", "--method", "greedy"), "--lr", "1e30", "--sched", "none"]
    ranks = forker.train(tmp_path, 2, *settings)
    codes = ranks.wait()
    assert sorted(codes) in ([1, 2], [2, 2])
    line = r"localprop: rank [01]: the loss of module 1 of 2 \(.*\) is nan at step 2.*\n"
    assert re.fullmatch(line, ranks.log.read_text()), ranks.log.read_text()


EXCHANGE = """
from types import SimpleNamespace as Toy
import torch
from localprop.network.carry import Carry
from localprop.parallel.job import join
from localprop.parallel.pipeline import PipelineStage
from localprop.parallel.placement import Placement
from localprop.tasks.classification import Classification

BACK = [(torch.ones(2, 3).t(), None), (torch.ones(2, 3), torch.tensor(512.0)), (None, torch.tensor(2.0)), (None, None)]
job = join("cpu")
modules = [Toy(local_loss=Toy(uses_inputs=False), reads=set(), shared=shared) for shared in (0, 1)]
stage = PipelineStage(job, Placement((range(1), range(1, 2))), Toy(local_modules=modules))
assert stage.exchange is stage
loads = lambda *_: ([torch.full((2, 3), float(step)), torch.zeros(2, dtype=torch.int64)] for step in range(len(BACK)))
data = Toy(steps_per_epoch=lambda size: len(BACK), train_batches=loads, task=Classification())
batches = stage.train_batches(data, 0, 2, 1, job.device, range(len(BACK)))
for step, (carry, (gradient, scale)) in enumerate(zip(batches, BACK, strict=True)):
    if job.rank == 0:
        carry.losses.append(torch.tensor(0.25))
        stage.hand_on(carry)
        for came, sent in ((carry.gradient, gradient), (carry.scale, scale)):
            assert came is sent is None or (came.equal(sent) and came.stride() == sent.stride()), (step, came, sent)
        assert carry.losses == [step + 0.5]
        assert stage.waiting().tensors == []  # what was sent is known to be taken
    else:
        assert carry.features.eq(step).all() and carry.losses == [0.25]
        carry.gradient, carry.scale, carry.losses[-1] = gradient, scale, torch.tensor(step + 0.5)
        stage.give_back(carry)
        assert carry.gradient is carry.scale is None
        stage.settle()
    stage.send(carry)  # which is not sent again
job.wait_for_all()
job.leave()
"""


def test_a_gradient_its_scale_and_the_loss_come_back(forker, tmp_path):
    ranks = forker.start(tmp_path / "log", 2, code=EXCHANGE)
    assert ranks.wait() == [0, 0], ranks.log.read_text()
