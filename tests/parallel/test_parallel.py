"""Modules in several processes: real ones, on scikit-learn's digits, against the same run in one process."""

import json
import os
import signal

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from adapters import needs_peft
from localprop.cli import main
from localprop.parallel.placement import IN_FLIGHT
from localprop.report.formats import format_bytes
from localprop.report.results import read_results
from ranks import CALM, LONG, MODULES, assert_same_run, flags, wait_for_step

pytestmark = [pytest.mark.processes, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


@pytest.mark.parametrize(("modules", "parts"), [(2, 1), (3, 1), (4, 1), (2, 4)])
def test_a_process_for_each_module_gives_the_same_bits(forker, alone, tmp_path, modules, parts):
    more = ("--epochs", "2", "--micro-batches", str(parts))
    ranks = forker.train(tmp_path, modules, *flags(tmp_path, modules, *more))
    assert ranks.wait() == [0] * modules, ranks.log.read_text()
    assert_same_run(tmp_path, alone(modules, *more))
    for row in read_results(tmp_path / "run" / "results.csv"):  # of the process that takes most, what is in flight too
        assert row.peak_memory == pytest.approx(row.predicted_memory, rel=0.01)
    shown = (tmp_path / "log.out").read_text()
    assert all(shown.count(text) == 1 for text in ("run folder", "epoch 1/2", "epoch 2/2", "test accuracy"))


def test_modules_share_a_process_and_images_are_loaded_where_a_loss_looks_at_them(forker, alone, tmp_path):
    more = ("--epochs", "2", "--method", "infopro", "--micro-batches", "2")
    ranks = forker.train(tmp_path, 2, *flags(tmp_path, 4, *more))
    assert ranks.wait() == [0, 0], ranks.log.read_text()
    assert_same_run(tmp_path, alone(4, *more))


@needs_peft
def test_adapters_are_trained_by_the_process_of_their_module_and_merged_by_the_last(forker, alone, tmp_path):
    more = ("--epochs", "1", "--lora", "2")
    ranks = forker.train(tmp_path, 2, *flags(tmp_path, 2, *more))
    assert ranks.wait() == [0, 0], ranks.log.read_text()
    assert_same_run(tmp_path, alone(2, *more))
    assert not any("lora" in name for name in load_file(tmp_path / "run" / "model.safetensors"))
    (row,) = read_results(tmp_path / "run" / "results.csv")
    assert row.peak_memory == pytest.approx(row.predicted_memory, rel=0.01)


def test_processes_stop_after_the_same_step_and_continue_from_it(forker, alone, tmp_path):
    ranks = forker.train(tmp_path, 3, *flags(tmp_path, 3, "--epochs", "2", "--steps", "7"))
    assert ranks.wait() == [0] * 3, ranks.log.read_text()
    assert_same_run(tmp_path, alone(3, "--epochs", "2", "--steps", "7"))
    ranks = forker.train(tmp_path, 3, "--resume", str(tmp_path / "run"))
    assert ranks.wait() == [0] * 3, ranks.log.read_text()
    assert_same_run(tmp_path, alone(3, "--epochs", "2", "--micro-batches", "1"))


# No dropped paths, which replicas draw for themselves (timm's Swin has some unless told); and steps of the gradient's
# size, or else roundings of a gradient near zero would show.


@pytest.mark.parametrize(
    ("kind", "count", "parts", "method"),
    [
        ("modules", 4, 1, "feature-reconstruction"),
        ("modules", 4, 2, "feature-reconstruction"),
        ("data", 2, 1, "feature-reconstruction"),
        ("data", 2, 2, "end-to-end"),
    ],
)
def test_replicas_agree_with_the_whole_batch(forker, tmp_path, kind, count, parts, method):
    settings = ["--method", method, *CALM, "--cuts", *MODULES[2], "--experiment", "run", "--micro-batches", str(parts)]
    runs = {name: tmp_path / name for name in ("one", "several")}
    for folder in runs.values():
        folder.mkdir()
    assert forker.train(runs["one"], 1, *settings, "--output", str(runs["one"]), kind=kind).wait() == [0]
    ranks = forker.train(runs["several"], count, *settings, "--output", str(runs["several"]), kind=kind)
    assert ranks.wait() == [0] * count, ranks.log.read_text()
    one, several = (load_file(folder / "run" / "model.safetensors") for folder in runs.values())
    for name, value in one.items():
        assert torch.allclose(several[name], value, rtol=1e-5, atol=1e-7), name
    (a,), (b,) = (read_results(folder / "run" / "results.csv") for folder in runs.values())
    assert b.train_losses == pytest.approx(a.train_losses, rel=1e-5)
    assert b.peak_memory == pytest.approx(b.predicted_memory, rel=0.01)


def test_replicas_train_exactly_in_a_finish_and_resume_there(forker, tmp_path):
    settings = ["--method", "greedy", *CALM, "--cuts", *MODULES[2], "--experiment", "run", "--epochs", "2"]
    settings += ["--finish", "0.5"]
    runs = {name: tmp_path / name for name in ("one", "several")}
    for folder in runs.values():
        folder.mkdir()
    assert main(["train", *settings, "--output", str(runs["one"])]) == 0
    stopped = [*settings, "--output", str(runs["several"]), "--steps", "7"]  # five before it, and two in it
    for words in (stopped, ["--resume", str(runs["several"] / "run")]):
        ranks = forker.train(runs["several"], 2, *words, kind="data")
        assert ranks.wait() == [0, 0], ranks.log.read_text()
    one, several = (load_file(folder / "run" / "model.safetensors") for folder in runs.values())
    for name, value in one.items():
        assert torch.allclose(several[name], value, rtol=1e-5, atol=1e-7), name
    a, b = (read_results(folder / "run" / "results.csv")[-1] for folder in runs.values())
    assert b.train_losses == pytest.approx(a.train_losses, rel=1e-5, nan_ok=True)
    assert b.peak_memory == pytest.approx(b.predicted_memory, rel=0.01)


@pytest.mark.parametrize("steps", ["128", "256"])  # images at a time: 11 and 5 steps an epoch
def test_what_is_on_its_way_is_measured_where_most_memory_is_in_a_process_that_receives(forker, tmp_path, steps):
    settings = flags(tmp_path, 3, "--epochs", "1", "--batch-size", steps, "--method", "greedy", "--cuts", "patch_embed")
    ranks = forker.train(tmp_path, 2, *settings)
    assert ranks.wait() == [0, 0], ranks.log.read_text()
    (row,) = read_results(tmp_path / "run" / "results.csv")
    assert row.peak_memory == pytest.approx(row.predicted_memory, rel=0.005)
    assert "rank 1 (predicted)" in (tmp_path / "log.out").read_text()


def test_what_averaging_takes_is_predicted(forker, tmp_path):
    wide = ["--model", "test_vit", "--model-kwargs", "depth=1", "patch_size=8", "embed_dim=384", "num_heads=4"]
    settings = [*wide, "--modules", "1", "--method", "end-to-end", "--opt", "sgd", "--batch-size", "64", "--device"]
    settings += ["cpu", "--epochs", "1", "--output", str(tmp_path), "--experiment", "run"]
    ranks = forker.train(tmp_path, 2, *settings, kind="data")
    assert ranks.wait() == [0, 0], ranks.log.read_text()
    (row,) = read_results(tmp_path / "run" / "results.csv")
    assert row.peak_memory == pytest.approx(row.predicted_memory, rel=0.005)
    weights = sum(tensor.nbytes for tensor in load_file(tmp_path / "run" / "model.safetensors").values())
    assert row.peak_memory > 3.9 * weights  # with momenta, gradients and their copy


def test_processes_evaluate_test_images_once_after_training(forker, tmp_path, capsys):
    for number, (part, count) in enumerate([("train", 8), ("val", 2), ("test", 3)]):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / part / name).mkdir(parents=True)
            for value in range(count):
                grey = 16 * value + 5 * number + 90 * (name == "cat")
                Image.new("L", (8, 8), grey).save(tmp_path / "pets" / part / name / f"{value}.png")
    settings = [*CALM, "--cuts", *MODULES[2], "--img-size", "16", "--batch-size", "8", "--output", str(tmp_path)]
    settings += ["--data", f"folder:{tmp_path / 'pets'}", "--experiment", "run"]
    ranks = forker.train(tmp_path, 4, *settings)  # two modules, each twice
    assert ranks.wait() == [0] * 4, ranks.log.read_text()
    tested = json.loads((tmp_path / "run" / "run.json").read_text())["test"]
    assert main(["eval", str(tmp_path / "run"), "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (tested["images"], result["images"]) == (6, 6)
    assert tested["loss"] == pytest.approx(result["loss"], abs=1e-4)
    assert (tmp_path / "log.out").read_text().count("test accuracy") == 1


def test_a_run_that_goes_on_elsewhere_forgets_what_was_measured(forker, tmp_path):
    ranks = forker.train(tmp_path, 2, *flags(tmp_path, 2, *LONG, "--reach", "0"))
    wait_for_step(tmp_path, 10)
    ranks.kill(0, signal.SIGTERM)
    assert ranks.wait() == [143, 143]
    assert forker.train(tmp_path, 1, "--resume", str(tmp_path / "run")).wait() == [0]
    first, *_, last = read_results(tmp_path / "run" / "results.csv")
    assert last.peak_memory == pytest.approx(last.predicted_memory, rel=0.01)
    assert last.peak_memory < 0.98 * first.peak_memory
    assert f"peak memory    {format_bytes(last.peak_memory)} measured" in (tmp_path / "log.out").read_text()


AVERAGE = """
import torch
from localprop.parallel import averaging
from localprop.parallel.job import join
from localprop.parallel.replicas import Replicas
averaging.BUCKET = 40  # bytes: several buckets, and some tensors alone
job = join("cpu")
kinds = [torch.float32, torch.bfloat16, torch.float32, torch.float64, torch.float32, torch.float32, torch.float32]
means = [torch.arange(3.0 * (k % 4 + 1)).view(3, -1).add(k).to(kinds[k]) for k in range(7)]
own = [mean + (1 if job.rank else -1) for mean in means]
own[5], own[6] = own[5].t().contiguous().t(), own[6].t().contiguous().t()
Replicas(job, [0, 1]).average(own)
for k, (tensor, mean) in enumerate(zip(own, means)):
    assert tensor.equal(mean), (k, tensor)
job.wait_for_all()
"""


def test_tensors_of_any_type_are_averaged_in_buckets(forker, tmp_path):
    ranks = forker.start(tmp_path / "log", 2, code=AVERAGE)
    assert ranks.wait() == [0, 0], ranks.log.read_text()


def test_stopped_by_a_signal_and_resumed_in_other_layouts_gives_the_same_bits(forker, alone, tmp_path):
    wanted = alone(3, *LONG)
    resume = ["--resume", str(tmp_path / "run")]
    ranks = forker.train(tmp_path, 2, *flags(tmp_path, 3, *LONG))
    wait_for_step(tmp_path, 5)
    ranks.kill(1, signal.SIGTERM)  # one of them alone
    assert ranks.wait() == [143, 143], ranks.log.read_text()
    assert ranks.log.read_text().count("stopped by SIGTERM") == 1
    first = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    ranks = forker.train(tmp_path, 1, *resume)
    wait_for_step(tmp_path, int(first.name[5:]) + 1)
    ranks.kill(0, signal.SIGTERM)
    assert ranks.wait() == [143], ranks.log.read_text()
    assert not (tmp_path / "run" / "model.safetensors").exists()
    ranks = forker.train(tmp_path, 3, *resume)
    assert ranks.wait() == [0, 0, 0], ranks.log.read_text()
    assert_same_run(tmp_path, wanted)


HAND_ON = """
import os, time, torch
from localprop.network.carry import Carry
from localprop.parallel.job import join
from localprop.parallel.messages import Receiver, Sender
job = join("cpu")
path, count = os.environ["SENT"], 20
if job.rank == 0:
    sender = Sender(job, 1)
    for step in range(count):
        sender.wait_for_room()
        sender.send(Carry(torch.full((64, 1024), float(step)), torch.zeros(64)), True, step == 0)
        open(path, "w").write(str(step + 1))
else:
    time.sleep(0.5)
    for step, carry in enumerate(Receiver(job, 0).stream(count)):
        assert carry.features.eq(step).all()
        time.sleep(0.05)
        ahead = int(open(path).read() or 0) - step
        with open(path + ".ahead", "a") as file:
            print(ahead, file=file)
job.wait_for_all()
"""


def test_a_slow_stage_holds_up_the_one_before(forker, tmp_path, monkeypatch):
    code = HAND_ON.replace('os.environ["SENT"]', repr(str(tmp_path / "sent")))
    ranks = forker.start(tmp_path / "log", 2, code=code)
    assert ranks.wait() == [0, 0], ranks.log.read_text()
    ahead = [int(line) for line in (tmp_path / "sent.ahead").read_text().split()]
    # The batch that is worked on, those that wait here, and those that are on their way.
    assert 1 < max(ahead) <= 1 + 2 * IN_FLIGHT
