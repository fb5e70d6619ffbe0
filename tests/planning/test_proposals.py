"""What is proposed for a budget from trained weights: in which order, why, and what `train` takes of it."""

import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from localprop import Plan, chain, localize, plan
from localprop.errors import PlanError
from localprop.memory.cost import Costs
from localprop.planning import known
from localprop.planning.known import KnownGap, cost_in_accuracy
from localprop.planning.planner import Planner
from localprop.planning.plans import MODULES
from localprop.planning.reporting import plan_lines, plan_report
from localprop.planning.schedules import Link
from localprop.planning.search.names import covering
from localprop.planning.search.proposals import proposals
from localprop.planning.search.trials import Terms
from localprop.planning.simulation import simulate_step
from localprop.runs.headroom import choose_for_budget
from localprop.settings.config import LocalConfig, ModelConfig, OptimConfig, TrainConfig
from localprop.settings.flags import parse
from localprop.settings.plan import PlanConfig
from localprop.settings.recipe import Recipe
from tiny import SIZE, build

WEIGHTS = ModelConfig("resnet18", initial_checkpoint="weights.safetensors")


def planned(budget=2**30, **options):
    options = {"show": "fits", "trained": True, "input_size": SIZE, **options}
    return plan(build("mlp"), 2, budget=budget, **options)


@pytest.fixture(scope="module")
def everything():
    """Where all that is proposed fits."""
    return planned()


@pytest.fixture(scope="module")
def little(everything):
    """Where end-to-end training does not: most of this model is its first layer."""
    return planned(int(0.9 * everything.baseline.peak))


def test_trained_weights_are_trained_whole_then_half_then_locally(everything, little):
    assert list(everything.fits) == list(little.fits) == ["exact", "frozen", "local"]
    assert everything.choice is everything.exact_fit is everything.baseline
    assert little.exact_fit is None
    assert little.choice is little.frozen_fit
    assert little.frozen_fit.peak < little.budget < everything.baseline.peak


def test_what_is_frozen_is_the_first_half_and_the_first_module(everything):
    half, local = everything.frozen_fit.setting.recipe, everything.local_fit.setting.recipe
    assert (half.method, half.modules, half.freeze, half.freeze_modules) == ("end-to-end", 1, ("1", "4"), 0)
    assert (local.method, local.freeze, local.freeze_modules) == (Recipe.method, None, 1)
    assert everything.local_fit.module_units[0] == ["1"]
    assert len(everything.local_fit.module_units) >= 3  # else one module would be trained, and exactly
    assert everything.frozen_fit.setting.name == "half frozen"
    assert ", 1 frozen" in everything.local_fit.setting.name


def test_what_is_proposed_is_a_simulated_step_of_its_recipe(everything):
    for row in (everything.frozen_fit, everything.local_fit):
        recipe = row.setting.recipe
        names = ("method", "cuts", "freeze", "freeze_modules", "split_blocks", "recompute_units")
        net = localize(build("mlp"), input_size=SIZE, batch_size=2, **{name: getattr(recipe, name) for name in names})
        assert simulate_step(net, OptimConfig(), 2, SIZE).peak == row.peak


def open_proposals(model, modules=MODULES, finish=0.0, trained=True, **recipe):
    units, link = chain(model, SIZE), Link(1.0)
    own = Recipe.of(**recipe)
    planner = Planner(model, {False: Costs(model, units)}, own, {}, OptimConfig(), None, 2, "cpu", None, link)
    planner.finish = finish
    return proposals(planner, modules, [], trained)


@pytest.mark.parametrize(
    ("options", "names", "asks_local"),
    [
        ({"trained": False}, ["exact", "local"], False),
        ({"freeze": ("1",)}, ["exact", "local"], False),
        ({"freeze_modules": 1, "modules": (2,)}, ["exact", "local"], True),
        ({"modules": (2,)}, ["exact", "frozen", "local"], True),
        ({"method": "lopt"}, ["exact", "frozen", "local"], True),
        ({"reach": 1}, ["exact", "frozen", "local"], True),
        ({"finish": 0.5}, ["exact", "frozen", "local"], True),
    ],
    ids=str,
)
def test_what_is_asked_for_is_planned_as_it_is(options, names, asks_local):
    found = open_proposals(build("mlp"), **options)
    assert list(found.finders) == names
    assert found.asks_local == asks_local
    assert found.finders["local"] is found.finders["exact"]  # which has what was asked for
    rows = dict.fromkeys(names, None) | {"exact": "whole", "local": "locally"}
    rows = {
        name: row and SimpleNamespace(setting=SimpleNamespace(same_numbers=True), own=row) for name, row in rows.items()
    }
    assert found.chosen(rows, 1).own == ("locally" if asks_local else "whole")


def test_another_batch_is_taken_only_where_nothing_fits_without():
    found = open_proposals(build("mlp"))
    exact, half = (SimpleNamespace(setting=SimpleNamespace(same_numbers=same)) for same in (False, True))
    assert found.chosen({"exact": exact, "frozen": half, "local": half}, 1) is half
    assert found.chosen({"exact": exact, "frozen": None, "local": None}, 1) is exact


def test_half_is_half_of_the_time_and_the_first_of_four_modules_a_quarter():
    found = open_proposals(build("vit")).finders
    freeze = [found[name].trials.planner.recipe.freeze for name in ("exact", "frozen", "local")]
    assert freeze == [None, ("patch_embed", "blocks.[0-1]"), ("patch_embed", "blocks.0")]
    assert found["local"].trials.planner.recipe.method == Recipe.method


def test_the_first_module_is_what_is_frozen_and_nothing_else():
    trials = open_proposals(build("mlp")).finders["local"].trials
    trials.planner.recipe = replace(trials.planner.recipe, freeze=("1", "4"))
    ways, states = trials.ways("local", Terms()), trials.states(Terms())
    for limit in (1.001 * ways.least(states), 2.0**40):
        assert ways.fastest(limit, states).ends == [2, 3, 4]


def test_a_model_that_cannot_be_cut_is_not_frozen():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 5))
    assert list(open_proposals(model).finders) == ["exact", "local"]


def test_each_proposal_says_why_it_is_where_it_is(everything):
    config = PlanConfig(backbone=WEIGHTS, local=LocalConfig(budget="1GiB"))
    lines = plan_lines(config, everything)
    heads = [i for i, line in enumerate(lines) if line.startswith("within 1.00 GiB, ")]
    told = [lines[i].partition(", ")[2].partition(":")[0] for i in heads]
    assert told == ["exact", "first half frozen", "local, first module frozen"]
    whys = [lines[i + 1] for i in heads]
    assert whys[0] == "first, since it has the accuracy of end-to-end training, whose gradients it computes"
    assert whys[1].startswith("next, since the first half keeps what it has learned, and the rest is trained exactly; ")
    assert whys[1].endswith("what a frozen first half costs in accuracy has not been measured with trained weights")
    assert whys[2].startswith("last, since the first module keeps what it has learned, and the others before")
    for i, row in zip(heads, everything.fits.values(), strict=True):
        command = shlex.split(lines[i + 2])
        config = parse(TrainConfig, "train", command[2:], TrainConfig())
        assert config.backbone == WEIGHTS
        recipe = row.setting.recipe
        assert (config.local.freeze, config.local.freeze_modules) == (recipe.freeze, recipe.freeze_modules)
        assert config.local.cuts == recipe.cuts
    ratio = everything.time_ratio(everything.frozen_fit)
    assert ratio < 1 < everything.time_ratio(everything.local_fit)
    order = f"the order is that of accuracy, not of time: end-to-end comes before half frozen ({ratio:.2f} of its time)"
    assert lines[-1] == order


def test_a_report_has_what_is_proposed(little):
    report = plan_report(PlanConfig(backbone=WEIGHTS, local=LocalConfig(budget="1GiB")), little)
    assert report["exact_fit"] is None
    assert report["choice"] == report["frozen_fit"]
    assert report["frozen_fit"]["freeze"] == ("1", "4")
    assert report["local_fit"]["freeze_modules"] == 1


def chosen(monkeypatch, result, open_, backbone=WEIGHTS, method="end-to-end"):
    monkeypatch.setattr("localprop.runs.headroom.plan_for", lambda *args, **options: result)
    config = TrainConfig(backbone, LocalConfig(method=method, budget="1GiB"))
    model = build("mlp")
    experiment = SimpleNamespace(
        config=config, device=torch.device("cpu"), backbone=model, input_size=SIZE, __dataclass_fields__={}
    )
    monkeypatch.setattr("localprop.runs.headroom.replace", lambda own, **new: replaced(own, new))
    experiment, lines = choose_for_budget(experiment, open_)
    return experiment.config.local, lines


def replaced(own, new):
    return SimpleNamespace(**{**vars(own), **new}) if isinstance(own, SimpleNamespace) else replace(own, **new)


def test_train_takes_the_first_proposal_that_fits(monkeypatch, everything, little):
    local, lines = chosen(monkeypatch, everything, open_=True)
    assert (local.method, local.freeze) == ("end-to-end", None)
    assert lines[0].startswith("budget 1.00 GiB: end-to-end, predicted to take")
    assert [line.partition(" would take")[0] for line in lines[1:]] == ["half frozen", "K=3, 1 frozen, fitted"]
    assert "in place of --budget: --method end-to-end --freeze 1 4" in lines[1]
    assert "in place of --budget: --cuts 1 7 --freeze-modules 1" in lines[2]
    local, lines = chosen(monkeypatch, little, open_=True)
    assert (local.method, local.freeze) == ("end-to-end", ("1", "4"))
    assert "half frozen, predicted to take" in lines[0]
    assert "of the time of end-to-end training; the first half keeps what it has learned" in lines[0]
    assert len(lines) == 2


@pytest.mark.parametrize(("open_", "backbone"), [(False, WEIGHTS), (True, ModelConfig())], ids=["asked", "scratch"])
def test_nothing_is_frozen_unasked_where_a_way_is_asked_for_or_weights_are_random(monkeypatch, little, open_, backbone):
    with pytest.raises(PlanError, match=r"nothing exact fits 1.00 GiB .*; half frozen takes .* --freeze 1 4"):
        chosen(monkeypatch, little, open_, backbone)


def test_local_modules_that_are_asked_for_are_taken(monkeypatch, everything):
    local, lines = chosen(monkeypatch, everything, open_=False, method=Recipe.method)
    assert (local.method, local.cuts) == (Recipe.method, ("1", "7"))
    assert "in place of --budget: --method end-to-end" in lines[1]


@pytest.mark.parametrize(
    ("units", "count", "names"),
    [
        (["patch_embed", *(f"blocks.{i}" for i in range(12)), "head"], 7, ("patch_embed", "blocks.[0-5]")),
        ([f"blocks.{i}" for i in range(24)], 12, ("blocks.[0-9]", "blocks.1[0-1]")),
        (["stem", "layers.0.a", "layers.0.b", "layers.1.a", "layers.2.a"], 4, ("stem", "layers.[0-1]")),
        (["layers.0.a", "layers.0.b", "layers.1.a", "layers.1.b"], 3, ("layers.0", "layers.1.a")),
        (["1", "4", "10", "11", "13"], 4, ("1", "4", "1[0-1]")),
        (["1", "10", "2", "3"], 2, ("1", "10")),
        (["a.1", "a.2.x", "a.2.y", "a.20"], 2, ("a.1", "a.2.x")),
        (["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn"], 1, ("blocks.0.attn",)),
    ],
)
def test_names_of_the_first_units_fit_these_alone(units, count, names):
    assert covering(units[:count], units[count:]) == names
    recipe = Recipe(freeze=names)
    assert [recipe.freezes(unit, last=False) for unit in units] == [True] * count + [False] * (len(units) - count)


def test_what_was_measured_from_scratch_is_not_told_of_trained_weights(monkeypatch):
    def gap(method, modules, points, **own):
        return KnownGap(method, modules, 0, False, 0.0, (points,), 2, "flowers", **own)

    measured = (
        gap("greedy", 4, -1.0),
        gap("greedy", 4, -2.0, trained=True),
        gap("greedy", 4, -3.0, trained=True, frozen="first"),
        gap("end-to-end", 1, -4.0, trained=True, frozen="half"),
    )
    monkeypatch.setattr(known, "known_gaps", lambda: measured)
    greedy, half = Recipe("greedy", 4), Recipe("end-to-end", 1, freeze=("a",))
    for points, words in {
        "-1.0": cost_in_accuracy(greedy),
        "-2.0": cost_in_accuracy(greedy, trained=True),
        "-3.0": cost_in_accuracy(replace(greedy, freeze_modules=1), trained=True, frozen="first"),
        "-4.0": cost_in_accuracy(half, trained=True, frozen="half"),
    }.items():
        assert f": {points} points (flowers, 2 seeds)" in words
    assert "what freezing costs in accuracy has not been measured with" in cost_in_accuracy(half, trained=True)
    assert "what greedy with a frozen part costs" in cost_in_accuracy(replace(greedy, freeze=("a",)), trained=True)


def test_a_plan_from_scratch_has_no_frozen_half():
    assert Plan([]).fits == {"exact": None, "local": None}
