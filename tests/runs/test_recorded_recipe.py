"""What a run's network is made of is recorded: later defaults, and another way to cut, change no old run."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from localprop.bench.record import read_record
from localprop.cli import main
from localprop.division.division import Division
from localprop.division.resolve import _USUAL, resolved
from localprop.methods.feature_reconstruction import FeatureReconstruction
from localprop.runs.recorded_recipe import changed_default, recipe_of_run
from localprop.settings.config import TrainConfig
from localprop.settings.earlier import NEWER
from localprop.settings.flat import free, to_flat
from localprop.settings.recipe import Recipe
from places import FIXTURES, ROOT

SMALL = ["--model-kwargs", "patch_size=4", "window_size=2", "embed_dim=12", "depths=(2,2)", "num_heads=(1,2)"]
FLAGS = ["--modules", "2", *SMALL, "--device", "cpu", "--batch-size", "64", "--epochs", "1", "--experiment", "run"]

# What version 0.1 did.
OPTIONS = {"weight": 1.0, "normalize": True, "sample": 1.0}
OPTIONS |= {"reconstruction": [1.0, 1.0], "task": [1.0, 1.0], "contrast": 0, "temperature": 0.07}


@pytest.fixture
def later(monkeypatch):
    """Changes a method's defaults and the way modules are balanced, as a later version may."""

    def change():
        others = FeatureReconstruction.__init__.__defaults__[3:]
        monkeypatch.setattr(FeatureReconstruction.__init__, "__defaults__", (7.0, False, 0.5, *others))
        monkeypatch.setattr(Division, "_balance", lambda self, ends, *_: [1, len(self.units)])

    return change


def test_a_run_is_resumed_with_what_it_began_with(tmp_path, later, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(["train", *FLAGS, "--output", str(whole)]) == 0
    assert main(["train", *FLAGS, "--output", str(stopped), "--steps", "9"]) == 0
    recipe = json.loads((stopped / "run" / "run.json").read_text())["recipe"]
    assert (recipe["modules"], recipe["recompute"]) == (2, True)
    assert recipe["method_kwargs"] == OPTIONS
    assert (recipe["head"], recipe["kinetic"], recipe["reach"]) == ("mlp", 0, 0)
    later()
    assert main(["train", "--resume", str(stopped / "run")]) == 0
    weights, expected = (load_file(folder / "run" / "model.safetensors") for folder in (stopped, whole))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    new = tmp_path / "new"  # and a new run has the new defaults
    assert main(["train", *FLAGS, "--output", str(new), "--steps", "1"]) == 0
    description = json.loads((new / "run" / "run.json").read_text())
    assert (description["recipe"]["method_kwargs"]["weight"], len(description["modules"][0])) == (7.0, 1)


def test_a_run_of_0_1_keeps_the_defaults_of_0_1(later):
    folder = FIXTURES / "run-0.1"
    later()
    recipe = recipe_of_run(folder, Recipe(modules=2))
    assert (recipe.modules, recipe.recompute, recipe.options, recipe.reach) == (2, True, OPTIONS, 0)
    modules = json.loads((folder / "run.json").read_text())["modules"]
    assert recipe.cuts == (modules[0][-1],)
    typed = recipe_of_run(folder, Recipe(modules=2, recompute=False, method_kwargs={"weight": 3.0}))
    assert (typed.recompute, typed.options["weight"]) == (False, 3.0)


def test_every_setting_that_0_1_did_not_have_says_what_it_was_then():
    old = yaml.safe_load((FIXTURES / "run-0.1" / "config.yaml").read_text())
    assert set(to_flat(TrainConfig())) - set(old) - free("config") == set(NEWER) - free("config")


def test_records_of_0_1_have_these_settings_too():
    record = read_record(next((ROOT / "benchmarks" / "results" / "cifar10-small").glob("*.json")))
    assert record.config["task"] == "classification"
    assert "steps" in record.config


@pytest.mark.parametrize("damage", [{"modules": [[], ["head"]]}, {"modules": [["nowhere"], ["head"]]}, {"recipe": 3}])
def test_damage_is_told_in_a_line(tmp_path, damage, capsys):
    run = shutil.copytree(FIXTURES / "run-0.1", tmp_path / "run")
    description = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**description, **damage}))
    assert main(["train", "--resume", str(run)]) == 2
    said = capsys.readouterr().err
    assert str(run) in said
    assert said.count("\n") == 1


def test_a_result_of_other_defaults_is_not_taken_for_done(later, monkeypatch):
    recipe = Recipe(modules=2, reach=0)
    assert changed_default(recipe, None) is None
    with monkeypatch.context() as other:
        other.setattr(FeatureReconstruction, "defaults", {"reach": 1})
        assert changed_default(Recipe(modules=2), None) == "reach is 1 now where it is left open, and was 0 then"
    later()
    assert changed_default(recipe, None) == "weight is 7.0 now where it is left open, and was 1.0 then"
    assert changed_default(replace(recipe, method_kwargs=OPTIONS), None) is None
    assert changed_default(Recipe(method="of-a-plugin"), None) is None


def test_a_result_of_another_default_head_is_not_taken_for_done(monkeypatch):
    recipe = Recipe(method="greedy", modules=2)
    recorded = resolved(recipe).record()
    monkeypatch.setitem(_USUAL, "head", "conv")
    monkeypatch.setitem(_USUAL, "kinetic", 0.1)
    for own in (None, recorded):
        said = changed_default(recipe, own)
        assert said == "head is conv now where it is left open, and was mlp then"
        assert "kinetic is 0.1 now" in changed_default(replace(recipe, head="mlp"), own)
        assert changed_default(replace(recipe, head="mlp", kinetic=0.0), own) is None


def test_a_result_of_another_default_recomputation_is_not_taken_for_done(monkeypatch):
    recipe = Recipe(method="greedy", modules=2)
    later = replace(resolved(recipe), recompute=False)
    monkeypatch.setattr("localprop.runs.recorded_recipe.resolved", lambda own, device: later)
    expected = "recompute is False now where it is left open, and was True then"
    assert changed_default(recipe, None) == changed_default(recipe, resolved(recipe).record()) == expected


def test_recomputation_is_compared_with_the_default_of_the_results_own_device():
    recipe = Recipe(method="greedy", modules=2)
    for device in ("cpu", "cuda"):
        assert changed_default(recipe, resolved(recipe, device).record(), device) is None
    assert resolved(recipe, "cpu").recompute
    assert not resolved(recipe, "cuda").recompute
