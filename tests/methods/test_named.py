"""Methods that are made of parts: what they fill in, and what a user's own choice does."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from localprop import localize
from localprop.cli import main
from localprop.division.resolve import resolved, with_methods_defaults
from localprop.errors import ConfigError
from localprop.heads.conv import ConvHead
from localprop.heads.linear import LinearHead
from localprop.heads.mlp import MlpHead
from localprop.heads.successor import SuccessorHead
from localprop.methods.feature_reconstruction import FeatureReconstruction
from localprop.network.kinetic import kinetic_weight
from localprop.settings.config import LocalConfig
from localprop.settings.recipe import Recipe
from ranks import assert_same_run, flags
from tiny import SIZE, build, split


def test_trgl_is_greedy_with_a_linear_head_and_the_kinetic_term():
    net = localize(build("vit"), 4, "trgl", cuts=["blocks.0", "blocks.1", "blocks.2"], input_size=SIZE)
    assert (net.recipe.head, net.recipe.kinetic) == ("linear", 0.1)
    assert [type(module.local_loss.head) for module in net.local_modules[:-1]] == [LinearHead] * 3
    # tau = 10, and 5 in the first half: 1 / (2 tau).
    assert [module.kinetic for module in net.local_modules] == [1 / 10, 1 / 10, 1 / 20, 1 / 20]


def test_a_users_choice_wins():
    net = split("vit", 2, "trgl", head="conv", kinetic=0.5)
    assert isinstance(net.local_modules[0].local_loss.head, ConvHead)
    assert [module.kinetic for module in net.local_modules] == [0.5, 0.25]
    assert split("vit", 2, "trgl", kinetic=0).local_modules[0].kinetic == 0


def test_other_methods_have_the_usual_head_and_no_kinetic_term():
    net = split("vit", 2, "greedy")
    assert (net.recipe.head, net.recipe.kinetic) == ("mlp", 0)
    assert isinstance(net.local_modules[0].local_loss.head, MlpHead)
    assert [module.kinetic for module in net.local_modules] == [0, 0]


def test_auglocal_is_greedy_with_heads_that_resemble_what_follows():
    net = split("swin", 3, "auglocal")
    assert net.recipe.head == "successor"
    assert net.recipe.head_kwargs == {"depth": 2, "tau": 0.5, "copy": None}
    assert [type(module.local_loss.head) for module in net.local_modules[:-1]] == [SuccessorHead] * 2
    shallow = split("vit", 3, "auglocal", head_kwargs={"depth": 1}, method_kwargs={"contrast": 1}).local_modules
    assert [module.local_loss.head.extra_repr() for module in shallow[:-1]] == ["blocks.3", "blocks.3, head"]
    with pytest.raises(ConfigError, match="the head is mlp; leave out head, or choose method greedy"):
        split("vit", 2, "auglocal", head="mlp")


def test_auglocal_resumes_as_it_was(tmp_path):
    settings = ["--method", "auglocal", "--head-kwargs", "depth=1", "--epochs", "1"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(["train", *flags(whole, 2, *settings)]) == 0
    assert main(["train", *flags(stopped, 2, *settings, "--steps", "3")]) == 0
    recorded = json.loads((stopped / "run" / "run.json").read_text())["recipe"]
    assert (recorded["head"], recorded["head_kwargs"]) == ("successor", {"depth": 1, "tau": 0.5, "copy": None})
    assert main(["train", "--resume", str(stopped / "run")]) == 0
    weights, expected = (load_file(folder / "run" / "model.safetensors") for folder in (stopped, whole))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("settings", "reach"),
    [
        ({}, 0),
        ({"modules": 2}, 0),
        ({"cuts": ("blocks.0",)}, 0),
        ({"reach": 0}, 0),
        ({"reach": 2}, 2),
        ({"head": "linear"}, 0),
        ({"modules": 1}, 0),
        ({"head": "successor"}, 0),
        ({"head": "successor", "reach": 1}, 1),
        ({"method": "greedy"}, 0),
        ({"method": "infopro"}, 0),
        ({"method": "trgl"}, 0),
        ({"method": "auglocal"}, 0),
        ({"method": "end-to-end", "modules": 4}, 0),
    ],
)
def test_no_shipped_method_reads_ahead_unasked(settings, reach):
    assert resolved(Recipe(**settings)).reach == reach


def test_a_method_may_read_ahead_unasked(monkeypatch):
    monkeypatch.setattr(FeatureReconstruction, "defaults", {"reach": 1})
    for settings, reach in (({}, 1), ({"reach": 0}, 0), ({"modules": 1}, 0), ({"head": "successor"}, 0)):
        assert resolved(Recipe(**settings)).reach == reach


@pytest.mark.processes
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_auglocal_with_the_kinetic_term_has_the_same_bits_in_processes(forker, tmp_path):
    settings = ["--method", "auglocal", "--kinetic", "0.1", "--epochs", "1"]
    runs = [tmp_path / "one", tmp_path / "two"]
    for count, folder in enumerate(runs, 1):
        folder.mkdir()
        job = forker.train(folder, count, *flags(folder, 2, *settings))
        assert job.wait() == [0] * count, job.log.read_text()
    assert_same_run(*runs)


def test_settings_are_filled_in_and_nothing_else():
    own = LocalConfig(method="trgl", budget="1GiB")
    filled = with_methods_defaults(own)
    assert (filled.head, filled.kinetic, filled.budget, filled.modules) == ("linear", 0.1, "1GiB", None)
    assert with_methods_defaults(LocalConfig(method="of-a-plugin")).head == "mlp"


@pytest.mark.parametrize(
    ("index", "count", "expected"),
    [(0, 1, 1), (0, 2, 1), (1, 2, 0.5), (0, 3, 1), (1, 3, 1), (2, 3, 0.5), (1, 4, 1), (2, 4, 0.5)],
)
def test_the_kinetic_term_is_halved_in_the_second_half(index, count, expected):
    assert kinetic_weight(1.0, index, count) == expected


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kinetic": -1.0}, "kinetic is -1.0; it must be at least 0"),
        ({"kinetic": float("nan")}, "kinetic is nan"),
        ({"head_kwargs": {"depth": 2}}, "head mlp has no option 'depth'; it has none"),
    ],
)
def test_impossible_settings_are_one_line(settings, said):
    with pytest.raises(ConfigError, match=said) as error:
        resolved(Recipe.of(**settings))
    assert "\n" not in str(error.value)
