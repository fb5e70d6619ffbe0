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
