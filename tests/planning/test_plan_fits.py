"""What a plan chooses for a budget, and the fastest settings for any memory."""

import itertools

import pytest

from localprop import localize, plan
from localprop.errors import ConfigError, PlanError
from localprop.planning.rows import PlanRow, Setting, told_apart
from localprop.planning.search.trials import Terms
from localprop.planning.settings import chosen
from localprop.planning.simulation import simulate_step
from localprop.settings.config import LocalConfig, OptimConfig, TrainConfig
from localprop.settings.recipe import Recipe
from small_plans import finder, names, small_plan, vit
from tiny import SIZE, build


@pytest.fixture(scope="module")
def searched():
    """A plan with all that it can have."""
    model = vit(4)
    least = plan(model, 32, modules=(2,), method="greedy", input_size=SIZE).baseline.step.peak
    return small_plan((2, 99), 32, model, budget=least // 2, show="fronts")


def test_the_fastest_exact_and_local_settings_fit_a_budget(searched):
    exact, local = searched.exact_fit, searched.local_fit
    for row in (exact, local):
        assert row.step.peak <= searched.budget
        assert row.micro_batches == 1
    assert exact.setting.recipe.end_to_end
    assert not local.setting.recipe.end_to_end
    assert local.setting.modules > 1
    # Those that are known to fit are no faster.
    fitting = [row for row in [*searched.exact, *searched.local] if row.step.peak <= searched.budget]
    assert fitting
    for row in fitting:
        found = exact if row.setting.recipe.end_to_end else local
        assert found.step.seconds <= 1.03 * row.step.seconds


def test_exact_training_with_a_kinetic_term_fits_its_budget():
    """The term keeps a gradient more at the peak: what fits without it may not fit with it."""
    model, options = vit(3), {"method": "end-to-end", "kinetic": 0.1}
    whole = finder(model, 64).trials.baseline(Terms()).step.peak
    same = finder(model, 64, recipe=Recipe(**options)).fitting("exact", whole)
    less = plan(model, 64, input_size=SIZE, budget=int(0.6 * whole), show="fits", **options).exact_fit
    for budget, row in ((whole, same), (int(0.6 * whole), less)):
        recipe = row.setting.recipe
        assert recipe.kinetic == 0.1
        places = {name: getattr(recipe, name) for name in ("modules", "cuts", "split_blocks", "recompute_units")}
        net = localize(model, **places, **options, input_size=SIZE)
        assert simulate_step(net, OptimConfig(), 64, SIZE).peak <= budget


def test_no_setting_of_a_front_beats_another(searched):
    assert searched.exact[-1] == searched.baseline
    for front in (searched.exact, searched.local):
        assert len(front) >= 3
        steps = [row.step for row in front]
        assert all(a.peak < b.peak and a.seconds > b.seconds for a, b in itertools.pairwise(steps))
    assert searched.exact[0].step.peak < searched.rows[1].step.peak  # checkpointing of whole blocks
    assert searched.local[0].step.peak < searched.rows[2].step.peak


def test_what_is_found_is_a_simulated_step_of_its_recipe(searched):
    for row in (searched.exact[0], searched.local[0]):
        recipe = row.setting.recipe
        settings = {name: getattr(recipe, name) for name in ("cuts", "split_blocks", "recompute_units", "method")}
        net = localize(vit(4), input_size=SIZE, batch_size=32, **settings)
        assert simulate_step(net, OptimConfig(), 32, SIZE).peak == row.step.peak
        assert [module.units for module in net.local_modules] == row.module_units
        again = [value for module in net.local_modules for value in module.recomputation]
        assert sum(value.startswith("whole") for value in again) == row.setting.again


@pytest.mark.parametrize(
    ("options", "kind", "modules"),
    [
        ({}, "exact", 1),
        ({"reach": 1}, "local", 2),
        ({"modules": (3,)}, "local", 3),
        ({"method": "end-to-end"}, "exact", 1),
    ],
)
def test_what_was_asked_for_is_chosen(options, kind, modules):
    options = {"modules": (2, 3), "method": "feature-reconstruction", **options}
    result = plan(build("mlp"), 4, input_size=SIZE, budget=2**30, show="fits", **options)
    assert result.choice is getattr(result, f"{kind}_fit")
    assert result.choice.setting.modules == modules
    assert names(result.rows) == ["end-to-end", "end-to-end + ckpt"]


@pytest.mark.parametrize("options", [{"freeze": ("0", "3")}, {"freeze_modules": 1}], ids=str)
def test_a_budget_knows_what_is_frozen(options):
    model = build("cnn")
    plain, frozen = (small_plan((2,), 16, model, **own) for own in ({}, options))
    for less, more in zip(frozen.rows, plain.rows, strict=True):
        assert less.step.peak < more.step.peak
        assert less.step.seconds < more.step.seconds
    budget = int(0.97 * frozen.baseline.step.peak)
    result = small_plan((2,), 16, model, budget=budget, show="fits", **options)
    for row in (result.exact_fit, result.local_fit):
        recipe = row.setting.recipe
        assert row.step.peak <= budget
        assert set(recipe.freeze) <= {"0", "3", "7"}
        assert recipe.freeze_modules == 0
        config = chosen(TrainConfig(local=LocalConfig(freeze_modules=options.get("freeze_modules", 0))), row)
        assert (config.local.freeze, config.local.freeze_modules) == (recipe.freeze, 0)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())


def test_frozen_modules_of_an_open_number_are_planned_and_not_fitted():
    model = build("mlp")
    result = small_plan((2, 3), 4, model, freeze_modules=2, show="fronts")
    assert names(result.rows) == ["end-to-end", "end-to-end + ckpt", "K=3"]
    assert "nothing is left to train in the 2 modules" in result.left_out["K=2"]
    with pytest.raises(ConfigError, match="freeze_modules needs their number too"):
        small_plan((2, 3), 4, model, freeze_modules=1, budget=2**30)


def test_less_memory_takes_no_less_time():
    own, fits = finder(build("cnn"), 16), []
    whole = own.trials.baseline(Terms()).step.peak
    for share in (0.8, 0.6, 0.45):
        fits.append(own.fitting("exact", int(share * whole)))
        assert fits[-1].step.peak <= share * whole
    times = [(row.micro_batches, row.step.seconds) for row in fits]
    assert times == sorted(times)


def test_settings_of_the_same_name_are_told_apart():
    step = small_plan((1,), 2, build("mlp")).baseline.step
    cuts = [("a",), ("b",), ("a",), ("c",)]
    rows = [PlanRow(Setting(Recipe(cuts=own), again=0), 2, 1, step, []) for own in cuts]
    named = told_apart(rows)
    assert [named[id(row)].setting.name for row in rows] == [
        "K=2, fitted", "K=2, fitted (2)", "K=2, fitted", "K=2, fitted (3)"
    ]  # fmt: skip
    assert [named[id(row)].setting for row in rows] == [row.setting for row in rows]


def test_a_budget_chooses_what_runs_again():
    with pytest.raises(ConfigError, match="a budget chooses which units run again"):
        small_plan((2,), model=build("mlp"), budget=2**30, grad_checkpointing=True)


def test_a_budget_below_a_single_image_is_an_error_of_one_line():
    with pytest.raises(
        PlanError,
        match=r"nothing fits 0.1 MiB: K=2, fitted, adamw8bit with 1 image at a time takes [\d.]+ MiB; .* --budget",
    ):
        small_plan((2,), 4, build("mlp"), budget=100_000, show="fits")
