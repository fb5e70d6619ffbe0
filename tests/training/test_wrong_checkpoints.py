"""Checkpoints that are wrong but well-formed: each works, or is passed over with a line for the one before it."""

import hashlib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from localprop.cli import main
from localprop.errors import CheckpointError, LocalpropError
from localprop.report.losses import LossCurve, read_losses
from localprop.report.results import read_results, write_results
from localprop.runs.experiment import prepare
from localprop.runs.recorded_settings import read_config
from localprop.training.checkpoints.loading import load_checkpoint
from localprop.training.checkpoints.saving import save_checkpoint
from localprop.training.state import TrainingState
from localprop.training.trainer import Trainer
from places import FIXTURES
from wrong_values import TAGS, WRONG, everything_wrong, one_line, sign


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """A trainer of the run of version 0.1, and a checkpoint of it before the one that is there.

    That one is as a signal behind the last batch of an epoch leaves it.
    """
    folder = Path(shutil.copytree(FIXTURES / "run-0.1", tmp_path_factory.mktemp("trainer") / "run"))
    experiment = prepare(read_config(folder), weights=False)
    config, data = experiment.config, experiment.data
    state = TrainingState(experiment.localize(), config.optim, data.steps_per_epoch(64), experiment.device)
    made = Trainer(state, data, config, folder, experiment.device, "", 1)
    made.resume()
    meta = load_checkpoint(folder / "checkpoints" / "step-00000030").meta
    meta["position"] |= {"epoch": 0, "batch": 22}
    save_checkpoint(folder / "before", 22, state.parts(), meta, keep=1)
    (folder / "before" / "step-00000022").rename(folder / "checkpoints" / "step-00000022")
    return made


def takes(trainer, newest):
    """Whether the newest checkpoint can be resumed; if so, a step is trained after it."""
    try:
        reason = trainer._accept(load_checkpoint(newest, flaw=trainer.state.flaw))
    except CheckpointError as error:
        one_line(error, newest)
        return False
    return not reason and resumes(trainer)


def resumes(trainer):
    """Resumes, and trains a step if the newest checkpoint was taken; whether it was."""
    notes = trainer.resume()
    taken = trainer.state.step == 30
    assert taken or trainer.state.step == 22
    if taken:
        torch.manual_seed(0)
        try:
            trainer.state.train_step([torch.randn(4, 3, 16, 16), torch.arange(4)], seed=1)
        except LocalpropError as error:
            one_line(error, "module")
    else:
        one_line(notes[0], "step-00000030")
    return taken


@pytest.fixture
def newest(trainer):
    folder = trainer.folder / "checkpoints" / "step-00000030"
    yield folder
    shutil.rmtree(folder)
    shutil.copytree(FIXTURES / "run-0.1" / "checkpoints" / "step-00000030", folder)


def test_a_manifest(trainer, newest):
    manifest = json.loads((newest / "manifest.json").read_text())
    taken = []
    cases = [*everything_wrong(manifest), *everything_wrong(manifest, TAGS, ("meta", "position"))]
    for i, (name, wrong) in enumerate(cases):
        (newest / "manifest.json").write_text(json.dumps(wrong))
        sign(newest)
        taken += [name] if (takes(trainer, newest) if i % 10 else resumes(trainer)) else []
    # Times and losses may be any, a layout is only a name, and a curve may be shorter.
    free = ("layout", "peak", "seconds", "epoch_seconds", "loss_sums.0")
    assert {name.split(":")[0] for name in taken if not name.startswith("meta.curve")} <= {
        f"meta.position.{name}" for name in free
    }
    assert trainer.resume()[-1].startswith("resumed from")


def test_names_of_parts_stay_in_the_checkpoint(trainer, newest):
    outside = trainer.folder / "outside.safetensors"
    shutil.copy(newest / "module-0.safetensors", outside)
    manifest = json.loads((newest / "manifest.json").read_text())
    for name in ("../../outside.safetensors", str(outside), "..", ".hidden.safetensors", "a\nb.safetensors"):
        (newest / "manifest.json").write_text(json.dumps({**manifest, "parts": [name, *manifest["parts"]]}))
        sign(newest)
        lines = [f"{hashlib.sha256(outside.read_bytes()).hexdigest()}  {name}\n"]
        (newest / "SHA256SUMS").write_text((newest / "SHA256SUMS").read_text() + "".join(lines))
        with pytest.raises(CheckpointError, match="is no file of a checkpoint"):
            load_checkpoint(newest)


def test_parts_of_a_checkpoint(trainer, newest):
    path = newest / "module-0.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        structure = json.loads(file.metadata()["structure"])
    wrongs = {**{name: WRONG[name] for name in ("gone", "null", "negative", "huge", "text", "list", "mapping")}, **TAGS}
    seen = set()
    for name, wrong in everything_wrong(structure, wrongs):
        place = name.split(":")[0]
        # One weight stands for all of a network, and the first parameter for all of an optimizer.
        kind = tuple(word for word in place.split(".") if not word.isdigit())
        key = (kind[:1] if kind[0] in ("backbone", "ema", "auxiliary") else kind, name.split(":")[1])
        if key in seen:
            continue
        seen.add(key)
        save_file(tensors, path, {"structure": json.dumps(wrong)})
        sign(newest)
        takes(trainer, newest)
    assert len(seen) > 100
    wrong_tensors = {name: tensor[:1].clone() if tensor.dim() else torch.zeros(3) for name, tensor in tensors.items()}
    for header in ({"structure": "[" * 100_000}, {"structure": "x"}, {"other": "{}"}, None):
        save_file(tensors, path, header)
        sign(newest)
        assert not resumes(trainer)
    save_file(wrong_tensors, path, {"structure": json.dumps(structure)})
    sign(newest)
    assert not resumes(trainer)


GROUP_OR_STATE = [
    ("param_groups", "amsgrad", True),
    ("param_groups", "maximize", True),
    ("param_groups", "differentiable", True),
    ("param_groups", "eps", -1.0),
    ("param_groups", "lr_scale", "x"),
    ("param_groups", "betas", (math.nan, 0.999)),
    ("state", "step", torch.zeros(3)),
    ("state", "step", torch.tensor(math.nan)),
    ("state", "exp_avg", None),
    ("state", "exp_avg", 5),
    ("state", "exp_avg_sq", "gone"),
]


@pytest.mark.parametrize(("place", "name", "wrong"), GROUP_OR_STATE, ids=lambda value: str(value)[:12])
def test_an_optimizer_that_would_fail_or_train_otherwise_is_passed_over(trainer, newest, place, name, wrong):
    checkpoint = load_checkpoint(newest)
    for part in checkpoint.parts.values():
        entries = part["optimizer"][place]
        for entry in entries if isinstance(entries, list) else entries.values():
            entry[name] = wrong
            if isinstance(wrong, str) and wrong == "gone":
                del entry[name]
    reason = trainer._accept(checkpoint)
    assert "the optimizer" in reason
    assert trainer._accept(load_checkpoint(newest)) is None


def test_a_setting_of_another_version_of_torch_that_is_off_is_no_hindrance(trainer, newest):
    checkpoint = load_checkpoint(newest)
    for part in checkpoint.parts.values():
        for group in part["optimizer"]["param_groups"]:
            group |= {"a_later_one": False, "fused": True}
    assert trainer._accept(checkpoint) is None


def test_a_bad_newest_checkpoint_is_passed_over_by_eval_too(trainer, newest, capsys):
    save_file({"x": torch.ones(1)}, newest / "module-0.safetensors", {"structure": '{"backbone": [], "auxiliary": {}}'})
    sign(newest)
    assert main(["eval", str(trainer.folder), "--device", "cpu"]) == 0
    assert "step-00000022" in capsys.readouterr().out


def test_what_a_run_with_a_skipped_step_writes_can_be_read_again(tmp_path, trainer, newest):
    """With a loss scale, a step whose loss overflows is skipped: its loss is recorded as it is."""
    curve = LossCurve(steps=2, modules=2)
    for step, losses in ((1, [math.nan, math.inf]), (2, [1.0, 2.0])):
        curve.add(step, losses, 0.1, 0.1)
    curve.write(tmp_path / "losses.csv", 2)
    assert math.isnan(read_losses(tmp_path / "losses.csv")[0][3])
    again = LossCurve(steps=2, modules=2)
    again.load(curve.state())
    assert str(again.rows) == str(curve.rows)
    rows = read_results(FIXTURES / "run-0.1-finished" / "results.csv")
    rows[-1] = replace(rows[-1], train_losses=(math.inf, 1.0), network=(*rows[-1].network[:-1], math.nan))
    write_results(tmp_path / "results.csv", rows)
    assert str(read_results(tmp_path / "results.csv")) == str(rows)
    checkpoint = load_checkpoint(newest)
    checkpoint.meta["position"]["loss_sums"][0] = math.nan
    assert trainer._accept(checkpoint) is None
