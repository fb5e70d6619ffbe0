"""Training within a budget, and what is said when memory runs out: the real command, on scikit-learn's digits."""

import re
import shlex
import signal
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file

from localprop import Plan, localize, plan
from localprop.cli import main
from localprop.cli import train as train_command
from localprop.errors import PlanError
from localprop.report.results import read_results
from localprop.runs.common import announce, not_run_again
from localprop.runs.headroom import choose_for_budget
from localprop.settings.config import LocalConfig, RunConfig, TrainConfig
from localprop.settings.flags import parse
from localprop.settings.flat import to_flags
from localprop.training.state import TrainingState
from localprop.training.trainer import Trainer
from stopped import stop_at
from tiny import build

MIB = 2**20
SMALL = ["--model", "test_vit", "--model-kwargs", "patch_size=4", "depth=2", "embed_dim=32", "num_heads=2"]
SMALL += ["--method", "greedy", "--batch-size", "128", "--epochs", "1", "--device", "cpu", "--experiment", "run"]


def train(output, *flags):
    return main(["train", *SMALL, "--output", str(output), *flags])


def settings(output):
    return yaml.safe_load((output / "run" / "config.yaml").read_text())


def command_in(line):
    """The settings of the command at the end of an error's line."""
    words = shlex.split(line.partition(": localprop train ")[2])
    return parse(TrainConfig, "train", words, TrainConfig())


@pytest.fixture(scope="module")
def within(tmp_path_factory):
    """A finished run within a budget that end-to-end training does not fit."""
    output = tmp_path_factory.mktemp("within")
    assert train(output, "--budget", "6.5MiB") == 0
    return output


def test_the_choice_is_recorded_and_both_peaks_agree(within):
    chosen = settings(within)
    assert (len(chosen["cuts"]), chosen["method"], chosen["batch_size"]) == (1, "greedy", 128)
    assert chosen["budget"] == "6.5MiB"
    (row,) = read_results(within / "run" / "results.csv")
    assert len(row.train_losses) == 2
    assert row.peak_memory == pytest.approx(row.predicted_memory, rel=0.03)
    assert row.peak_memory < 6.5 * MIB


def test_a_chosen_run_is_the_same_as_one_with_these_settings(within, tmp_path):
    chosen, default = settings(within), TrainConfig().local
    again = LocalConfig(**{f.name: chosen.get(f.name, getattr(default, f.name)) for f in fields(LocalConfig)})
    flags = to_flags(TrainConfig(local=replace(again, budget=None)))
    assert train(tmp_path, *flags) == 0
    a, b = (load_file(output / "run" / "model.safetensors") for output in (within, tmp_path))
    assert all(torch.equal(a[name], b[name]) for name in a)


def open_train(output, *flags):
    """Where nothing asks for local modules."""
    flags = [*flags, "--output", str(output)]
    return main(["train", *(word for word in SMALL if word not in ("--method", "greedy")), *flags])


def test_end_to_end_training_that_fits_is_chosen(tmp_path, capsys):
    assert open_train(tmp_path, "--budget", "1GiB") == 0
    line = " ".join(capsys.readouterr().out.split())
    assert "budget 1.00 GiB: end-to-end, predicted to take" in line
    assert " --method feature-reconstruction would take" in line
    assert "accuracy" in line
    assert (settings(tmp_path)["method"], settings(tmp_path)["modules"]) == ("end-to-end", None)


def test_exact_training_is_chosen_unless_local_modules_are_asked_for(tmp_path, capsys):
    assert open_train(tmp_path / "a", "--budget", "8MiB", "--steps", "3") == 0
    chosen = settings(tmp_path / "a")
    assert chosen["method"] == "end-to-end"
    assert chosen["recompute_units"] or chosen["cuts"]
    (tmp_path / "own.yaml").write_text("method: feature-reconstruction\n")
    flags = ["--budget", "8MiB", "--steps", "3", "-c", str(tmp_path / "own.yaml")]
    assert open_train(tmp_path / "b", *flags) == 0
    assert settings(tmp_path / "b")["method"] == "feature-reconstruction"
    assert len(settings(tmp_path / "b")["cuts"]) >= 1
    for name in "ab":
        (row,) = read_results(tmp_path / name / "run" / "results.csv")
        assert row.peak_memory < 8 * MIB
        assert row.peak_memory == pytest.approx(row.predicted_memory, rel=0.03)


def test_a_budget_never_changes_the_batch(tmp_path, capsys):
    assert train(tmp_path, "--modules", "2", "--budget", "0.6MiB", "--batch-size", "24") == 2
    line = capsys.readouterr().err
    assert "nothing local fits 0.6 MiB with 24 images at a time" in line
    assert line.count("\n") == 1
    assert not (tmp_path / "run").exists()
    config = command_in(line)
    assert config.optim.batch_size == 24
    assert 1 < config.optim.micro_batches < 24
    assert config.local.count == 2
    assert config.local.budget is None  # it would choose again
    assert config.run.output == tmp_path


@pytest.mark.parametrize(("device", "assumed"), [("cpu", "cpu"), ("cuda", "cuda"), ("mps", "cpu")])
def test_what_fits_is_planned_for_the_device_that_trains(monkeypatch, device, assumed):
    planned = []

    def plan_for(*arguments, **options):
        planned.append((options["device"], options["offload"]))
        raise PlanError("enough")

    monkeypatch.setattr("localprop.runs.headroom.plan_for", plan_for)
    backbone, size = torch.nn.Linear(1, 1), (3, 8, 8)
    for graphs in ("auto", "on"):
        config = TrainConfig(local=LocalConfig(budget="1GiB"), run=RunConfig(cuda_graphs=graphs))
        experiment = SimpleNamespace(config=config, device=torch.device(device), backbone=backbone, input_size=size)
        with pytest.raises(PlanError, match="enough"):
            choose_for_budget(experiment)
    assert planned == [(assumed, True), (assumed, False)]


@pytest.mark.parametrize(
    ("named", "told"),
    [({"blocks.2": "whole"}, True), ({"blocks.0": "whole"}, False), ({"blocks.2": "cheap"}, False), (None, False)],
)
def test_units_that_a_head_reads_ahead_and_that_are_to_run_again_are_told(named, told):
    options = {"cuts": ["blocks.1"], "reach": 1, "recompute_units": named, "grad_checkpointing": True}
    net = localize(build("vit"), method="greedy", input_size=(3, 32, 32), **options)
    assert not_run_again(net) == ["blocks.2"] * told
    console = Console(record=True, width=200, quiet=True)
    console.out = lambda text, **_: lines.append(text)
    lines = []
    experiment = SimpleNamespace(title="x", data=SimpleNamespace(img_size=32), config=SimpleNamespace(finish_epochs=0))
    announce(console, experiment, net, Path("run"), "cpu")
    assert any("does not run blocks.2 again" in line for line in lines) == told


def test_a_budget_never_changes_the_optimizer(monkeypatch):
    backbone, size = build("mlp"), (3, 32, 32)
    row = plan(backbone, 4, modules=(1,), method="end-to-end", input_size=size).baseline
    low = replace(row, setting=replace(row.setting, opt="adamw8bit"))
    monkeypatch.setattr("localprop.runs.headroom.plan_for", lambda *args, **options: Plan([row], exact_fit=low))
    config = TrainConfig(local=LocalConfig(method="end-to-end", budget="1MiB"))
    experiment = SimpleNamespace(config=config, device=torch.device("cpu"), backbone=backbone, input_size=size)
    with pytest.raises(PlanError, match=r"nothing exact fits 1.0 MiB .*; end-to-end, adamw8bit takes .* adamw8bit"):
        choose_for_budget(experiment)


def test_a_resumed_run_does_not_choose_again(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 3, per_epoch=12)
        assert train(tmp_path, "--budget", "6.5MiB") == 128 + signal.SIGTERM
    monkeypatch.setattr("localprop.runs.common.choose_for_budget", lambda experiment: pytest.fail("it chose again"))
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    (row,) = read_results(tmp_path / "run" / "results.csv")
    assert row.peak_memory == pytest.approx(row.predicted_memory, rel=0.03)


def exhausted(monkeypatch, available):
    """Lets the second step ask for more memory than there is, and the advice believe that so much can be had."""
    step = TrainingState.train_step

    def run_out(self, batch, seed, last=True):
        if self.step == 1:
            torch.empty(1 << 50, dtype=torch.uint8)
        return step(self, batch, seed, last)

    monkeypatch.setattr(TrainingState, "train_step", run_out)
    monkeypatch.setattr("localprop.runs.headroom.available", lambda device: available)


def test_out_of_memory_is_one_line_with_a_command_that_fits(tmp_path, monkeypatch, capsys):
    exhausted(monkeypatch, int(6.5 * MIB))
    assert train(tmp_path, "--modules", "2") == 2
    line = capsys.readouterr().err
    assert re.search(r"out of memory on cpu: 5\.\d MiB predicted, \d+\.\d MiB taken when .* could not be had", line)
    assert line.count("\n") == 1
    words = shlex.split(line.partition(": localprop train ")[2])
    assert command_in(line).local.count >= 2
    monkeypatch.undo()
    assert main(["train", *words, "--experiment", "again"]) == 0
    (row,) = read_results(tmp_path / "again" / "results.csv")
    assert row.peak_memory < 6.5 * MIB


def test_out_of_memory_in_an_evaluation_is_one_line_too(tmp_path, monkeypatch, capsys):
    def evaluate(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    assert train(tmp_path, "--modules", "2") == 2
    line = capsys.readouterr().err
    assert "out of memory on cpu" in line
    assert "when 20.00 MiB more could not be had" in line
    assert line.count("\n") == 1


def test_out_of_memory_where_nothing_fits_says_so(tmp_path, monkeypatch, capsys):
    exhausted(monkeypatch, 100_000)
    assert train(tmp_path, "--modules", "2", "--batch-size", "2") == 2
    line = capsys.readouterr().err
    assert "out of memory on cpu" in line
    assert "nothing fits" in line
    assert line.count("\n") == 1


def test_a_peak_above_what_can_be_had_is_told_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("localprop.runs.headroom.available", lambda device: 4 * MIB)
    assert train(tmp_path, "--modules", "2") == 0
    output = capsys.readouterr().out
    assert "peak memory of a step: 5." in output
    assert "can be had on cpu: --budget 4." in output


def test_another_error_keeps_its_traceback(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("something else")

    monkeypatch.setattr(TrainingState, "train_step", fail)
    with pytest.raises(RuntimeError, match="something else"):
        train(tmp_path, "--modules", "2")


@pytest.mark.parametrize(
    ("flags", "method", "open_"),
    [
        ([], "end-to-end", True),
        (["--lr", "1"], "end-to-end", True),
        (["--finish", "0.1"], "feature-reconstruction", False),
        (["--method", "end-to-end"], "end-to-end", False),
        (["--freeze", "head"], "end-to-end", False),
    ],
)
def test_what_is_named_asks_for_a_way_to_train(monkeypatch, flags, method, open_):
    seen = []
    monkeypatch.setattr(train_command, "_start", lambda config, *rest: seen.append((config.local.method, rest[-1])))
    train_command.prepare(["--budget", "8MiB", *flags])
    assert seen == [(method, open_)]


def test_trained_weights_that_do_not_fit_whole_are_trained_in_part(tmp_path, monkeypatch, capsys):
    own = dict(zip(("depth", "embed_dim", "num_heads"), (2, 32, 2), strict=True))
    model = timm.create_model("test_vit", img_size=8, patch_size=4, num_classes=3, **own)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")

    def plan_for(model, local, optim, size, budget, trained, **_):
        assert trained
        freeze = ["patch_embed", "blocks.0"]
        whole = plan(model, optim.batch_size, modules=(1,), method="end-to-end", input_size=size).baseline
        row = plan(model, optim.batch_size, modules=(1,), method="end-to-end", input_size=size, freeze=freeze).baseline
        half = replace(row, setting=replace(row.setting, frozen="half"))
        return Plan([whole], budget=budget, frozen_fit=half, proposed=("exact", "frozen", "local"))

    monkeypatch.setattr("localprop.runs.headroom.plan_for", plan_for)
    flags = ["--model", "test_vit", "--model-kwargs", "patch_size=4", *(f"{key}={value}" for key, value in own.items())]
    flags += ["--initial-checkpoint", str(tmp_path / "weights.safetensors"), "--output", str(tmp_path)]
    flags += ["--experiment", "run", "--batch-size", "2", "--steps", "2", "--epochs", "1", "--device", "cpu"]
    assert main(["train", *flags, "--budget", "0.9MiB"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "budget 0.9 MiB: half frozen" in text
    assert "Train it further (PATH has" in text
    assert f"--data folder:PATH --initial-checkpoint {tmp_path / 'run'}" in text
    assert settings(tmp_path)["freeze"] == ["patch_embed", "blocks.0"]
    after = load_file(tmp_path / "run" / "model.safetensors")
    same = {name for name, value in model.state_dict().items() if torch.equal(value, after[name])}
    assert any("blocks.0" in name for name in same)
    assert not any("blocks.1" in name for name in same)
    assert main(["train", *flags[:-2], "--experiment", "asked", "--method", "end-to-end", "--budget", "0.9MiB"]) == 2
    assert "nothing exact fits 0.9 MiB" in capsys.readouterr().err
