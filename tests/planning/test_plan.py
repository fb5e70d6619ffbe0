"""Plans: what each setting takes, what is chosen for a budget, and the command that tells it."""

import copy
import itertools
import json
import re
import shlex
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest
import timm
import torch
from torch import nn

from localprop import Plan, chain, localize, plan
from localprop.cli import main
from localprop.errors import ChainError, ConfigError, LocalpropError, PlanError
from localprop.memory.cost import Costs
from localprop.memory.cuda import matrix_product_buffers
from localprop.planning.planner import Planner, optim_of
from localprop.planning.reporting import plan_lines
from localprop.planning.rows import PlanRow, Setting, told_apart
from localprop.planning.schedules import Link
from localprop.planning.search.finder import Finder
from localprop.planning.search.trials import Terms, Trials
from localprop.planning.settings import chosen
from localprop.planning.simulation import simulate_step
from localprop.planning.steps import PARTS
from localprop.settings.config import LocalConfig, ModelConfig, OptimConfig, TrainConfig
from localprop.settings.flags import parse
from localprop.settings.flat import to_flags
from localprop.settings.plan import PlanConfig
from localprop.settings.recipe import Recipe
from localprop.settings.values import parse_bytes
from tiny import CLASSES, SIZE, build

MIB = 2**20


def vit(depth):
    return timm.create_model("test_vit", img_size=32, patch_size=4, depth=depth, embed_dim=32, num_heads=2)


def small_plan(modules=(2, "max", 99), batch_size=16, model=None, **options):
    return plan(model or build("vit"), batch_size, modules=modules, method="greedy", input_size=SIZE, **options)


@pytest.fixture(scope="module")
def result():
    return small_plan()


def names(rows):
    return [row.setting.name for row in rows]


def test_a_row_for_each_setting_end_to_end_first(result):
    assert names(result.rows) == ["end-to-end", "end-to-end + ckpt", "K=2", "K=4, max"]
    assert [row.batch_size for row in result.rows] == [16] * 4
    assert [len(row.module_units) for row in result.rows] == [1, 1, 2, 4]
    assert result.baseline is result.rows[0]
    assert result.typical is result.rows[3]
    assert result.choice is None
    for row in result.rows:
        assert [*itertools.chain(*row.module_units)] == ["patch_embed", *(f"blocks.{i}" for i in range(4)), "head"]


def test_ratios_are_those_to_end_to_end(result):
    memory, time, flops = (
        [ratio(row) for row in result.rows] for ratio in (result.memory_ratio, result.time_ratio, result.flops_ratio)
    )
    assert memory[0] == time[0] == flops[0] == 1
    assert memory == [row.step.peak / result.rows[0].step.peak for row in result.rows]
    assert 1 > memory[2] > memory[3]
    assert 1.2 < flops[1] < 1.4  # forward twice
    assert 1.2 < time[1] < 1.7  # so small a step is bound by calls, of which there are more than operations
    assert 1 < flops[2] < flops[3] < 1.1  # heads


def test_a_row_is_a_simulated_step_of_that_setting(result):
    model = build("vit")
    settings = {1: {"method": "end-to-end", "grad_checkpointing": True}, 2: {"modules": 2, "method": "greedy"}}
    for i, options in settings.items():
        net = localize(model, input_size=SIZE, batch_size=16, **options)
        assert simulate_step(net, OptimConfig(), 16, SIZE) == result.rows[i].step
        assert [module.units for module in net.local_modules] == result.rows[i].module_units


def test_a_plan_knows_heads_that_read_ahead_and_what_single_units_compute_again():
    again, model = {"recompute_units": {"blocks.0": "whole"}}, vit(2)
    settings = [{}, {"reach": 1}, {"reach": 1, **again}]
    plain, ahead, less = (small_plan((2,), 16, model, **options).rows for options in settings)
    net = localize(vit(2), 2, "greedy", input_size=SIZE, batch_size=16, reach=1, **again)
    assert simulate_step(net, OptimConfig(), 16, SIZE) == less[2].step
    assert ahead[2].step.flops > plain[2].step.flops
    assert ahead[2].step.peak > plain[2].step.peak
    chosen_row = small_plan((2,), 16, model, reach=1, budget=ahead[2].step.peak, show="fits").choice
    assert chosen_row.setting.recipe.reach == 1
    assert plain[0].step == ahead[0].step == less[0].step


def test_planning_leaves_the_model_and_the_random_state_alone():
    model, told = build("mlp").eval(), []
    weights, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    rows = small_plan(model=model, on_setting=told.append).rows
    assert told == [row.setting for row in rows if row.setting.modules < 99] + [s for s in told if s.modules == 99]
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


def test_blocks_are_split_where_more_modules_of_whole_ones_save_nothing():
    """Of five blocks, four modules have two together as three have."""
    rows = small_plan((3, 4, "max"), model=vit(5)).rows[2:]
    assert names(rows) == ["K=3", "K=4", "K=4, split", "K=10, split, max"]
    assert rows[2].step.peak < rows[1].step.peak
    assert [row.setting.split_blocks for row in rows] == [False, False, True, True]


def test_options_reach_every_local_row():
    kwargs = {"modules": (2,), "model": build("cnn")}
    plain = small_plan(**kwargs).rows
    for options in ({"amp_dtype": torch.bfloat16}, {"opt": OptimConfig(opt="sgd", model_ema=True)}):
        other = small_plan(**kwargs, **options).rows
        assert all(a.step.peak != b.step.peak for a, b in zip(plain, other, strict=True))
    for options in ({"head": "conv"}, {"cuts": ["3"]}):
        other = small_plan(**kwargs, **options).rows
        assert other[0].step == plain[0].step
        assert (other[2].step, other[2].module_units) != (plain[2].step, plain[2].module_units)
    checkpointed = small_plan(**kwargs, grad_checkpointing=True).rows
    assert names(checkpointed) == ["end-to-end", "end-to-end + ckpt", "K=2 + ckpt"]


def test_a_plan_for_cuda_takes_its_speed_and_its_buffers():
    buffers = sum(matrix_product_buffers())
    for batch_size in (16, 2**17):
        cpu, cuda = (small_plan((2,), batch_size, build("mlp"), device=device).rows for device in ("cpu", "cuda"))
        for a, b in zip(cpu, cuda, strict=True):
            assert b.step.flops == a.step.flops
            if batch_size == 16:
                assert 0 <= b.step.peak - buffers - a.step.peak < 100_000  # whole blocks of memory
            else:  # so many images that calls do not count
                assert b.step.seconds < 0.01 * a.step.seconds


def test_end_to_end_in_modules_is_exact_training():
    result = plan(build("mlp"), 4, method="end-to-end", input_size=SIZE, modules=(1, 2, "max"), nproc=2)
    assert names(result.rows) == ["end-to-end", "end-to-end + ckpt", "exact K=2", "exact K=4, max"]
    whole, _, two, most = (row.step for row in result.rows)
    assert most.peak <= two.peak < whole.peak
    assert whole.seconds < two.seconds < 1.5 * whole.seconds
    assert result.pipeline is not None
    assert {row.not_parallel for row in result.rows[2:]} == {"its modules wait for each other, and share one process"}
    assert names([plan(build("mlp"), 4, method="end-to-end", input_size=SIZE, budget=two.peak).choice]) != [
        "end-to-end"
    ]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"modules": (7,)}, ChainError, "7 modules asked for"),
        ({"modules": (3,), "cuts": ["7", "1"]}, ChainError, "not in order"),
        ({"modules": (2, 3), "cuts": ["1"]}, ConfigError, "1 cuts make 2 modules, not 3"),
        ({"batch_size": 0}, ConfigError, "batch_size is 0"),
        ({"head": "mpl"}, ConfigError, "did you mean 'mlp'"),
        ({"opt": "adamv"}, LocalpropError, "adamv"),
    ],
)
def test_a_mistake_is_one_line(options, error, words):
    with pytest.raises(error, match=words) as caught:
        small_plan(model=build("mlp"), **options)
    assert "\n" not in str(caught.value)


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


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_exact_training_with_a_kinetic_term_fits_its_budget(share):
    """The term keeps a gradient more at the peak: what fits without it may not fit with it."""
    model, options = vit(3), {"method": "end-to-end", "input_size": SIZE}
    budget = int(share * plan(model, 64, modules=(1,), **options).baseline.step.peak)
    recipe = plan(model, 64, budget=budget, kinetic=0.1, show="fits", **options).exact_fit.setting.recipe
    assert recipe.kinetic == 0.1
    places = {name: getattr(recipe, name) for name in ("modules", "cuts", "split_blocks", "recompute_units")}
    net = localize(model, **places, method="end-to-end", kinetic=0.1, input_size=SIZE)
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
    model, fits = build("cnn"), []
    whole = small_plan((2,), 16, model).baseline.step.peak
    for share in (0.8, 0.6, 0.45):
        result = small_plan((2, 3), 16, model, budget=int(share * whole), show="fits")
        assert result.exact_fit.step.peak <= share * whole
        fits.append(result.exact_fit)
    times = [(row.micro_batches, row.step.seconds) for row in fits]
    assert times == sorted(times)


def finder(model, batch_size=8, device="cpu", **changes):
    """What searches settings of a model."""
    units, optim = chain(model, SIZE), OptimConfig(**changes)
    planner = Planner(
        model, {False: Costs(model, units)}, Recipe(), {}, optim, None, batch_size, device, None, Link(1.0)
    )
    return Finder(Trials(planner, (1,), []))


def test_states_in_8_bits_are_for_where_nothing_else_fits(monkeypatch):
    """Nothing is divided into more parts afterwards that would fit with the optimizer that was asked for."""
    own, tried = finder(build("mlp"), 4), []
    low = own.trials.baseline(Terms(opt="adamw8bit"))
    assert low.step == small_plan((1,), 4, build("mlp"), opt="adamw8bit", show="fits").baseline.step
    assert low.step.parts["optimizer"] < 0.5 * own.trials.baseline(Terms()).step.parts["optimizer"]
    monkeypatch.setattr(
        own, "_fastest", lambda kind, budget, terms: tried.append(terms) or (low if terms.opt else None)
    )
    assert own.fitting("exact", 2**30) is low
    assert [terms[:3] for terms in tried] == [
        (None, False, None), (None, True, None), (2, False, None), (4, False, None), (None, False, "adamw8bit")
    ]  # fmt: skip
    assert not low.setting.same_numbers
    lines = plan_lines(PlanConfig(batch_size=4), Plan([low], budget=2**30, exact_fit=low))
    told = lines.index("nothing fits otherwise: adamw8bit rounds its states to 8 bits, which is other training")
    assert "--opt adamw8bit" in lines[told + 1]
    assert finder(build("mlp"), opt="lion").trials.optimizers == (None,)


def weighty():
    """A model whose weights take more than all else."""
    layers = [nn.Linear(192, 192) for _ in range(4)]
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), *layers, nn.Linear(192, CLASSES))


def test_states_rest_on_the_host_where_that_is_what_fits():
    own = finder(weighty(), 2, "cuda")
    step = own.trials.baseline(Terms()).step
    # Two weights fit, with the states of their optimizer; all gradients, or all states and one gradient, do not.
    row = own.fitting("exact", step.peak - int(1.2 * step.parts["parameters"]))
    setting = row.setting
    assert setting.offload[-1] == "optimizer"
    assert setting.same_numbers
    assert setting.name.endswith(", offload")
    assert row.step.peak <= step.peak - 1.2 * step.parts["parameters"]
    net = localize(weighty(), cuts=setting.recipe.cuts, split_blocks=True, method="end-to-end", input_size=SIZE)
    assert row.step == simulate_step(net, optim_of(setting, OptimConfig()), 2, SIZE, "cuda")
    assert "--offload-optimizer" in plan_lines(PlanConfig(batch_size=2), Plan([row], budget=2**30, exact_fit=row))[3]
    assert own.trials.offloads("local") == [(), ("optimizer",)]
    assert finder(weighty(), 2, "cuda", offload_optimizer=True).trials.offloads("local") == [()]


@pytest.mark.parametrize(("away", "graphs", "taken"), [(0.9, 1.0, True), (0.9, 0.8, False), (0.99, 1.0, False)])
def test_states_rest_on_the_host_where_that_is_faster_than_cuda_graphs(monkeypatch, away, graphs, taken):
    own = finder(weighty(), 2, "cuda", offload_boundaries=True)
    row = own.trials.baseline(Terms())
    two = replace(row.setting, recipe=replace(row.setting.recipe, modules=2))
    rows = {
        (): replace(row, setting=two, step=replace(row.step, seconds=1.0, device_seconds=graphs)),
        ("optimizer",): replace(
            row, setting=replace(two, offload=("optimizer",)), step=replace(row.step, seconds=away)
        ),
    }
    monkeypatch.setattr(own, "_fastest", lambda kind, budget, terms: rows[terms.offload])
    monkeypatch.setattr("localprop.planning.search.finder._worth", lambda way, usual: True)
    assert own.fitting("exact", row.step.peak) is rows[("optimizer",) if taken else ()]


def test_micro_batches_are_named_where_they_are_faster(monkeypatch):
    monkeypatch.setattr("localprop.planning.search.finder._WORTH", 100.0)
    whole = small_plan((1,), 16, show="fits").baseline.step.peak
    result = small_plan((1,), 16, budget=int(0.6 * whole), show="fits")
    divided, count = result.divided_fit, result.divided_fit.micro_batches
    assert divided.setting.name == f"end-to-end in {count} micro-batches"
    assert divided.step.peak <= result.budget
    fewer = OptimConfig(micro_batches=count // 2)
    net = localize(build("vit"), 1, "end-to-end", input_size=SIZE)
    assert simulate_step(net, fewer, 16, SIZE).peak > result.budget
    assert result.exact_fit.setting.same_numbers
    config = PlanConfig(batch_size=16)
    (told,) = [line for line in plan_lines(config, result) if f"in {count} micro-batches, whose gradients" in line]
    assert f"--micro-batches {count}" in told


def test_micro_batches_are_not_named_where_they_are_slower_or_other_batches(monkeypatch):
    own = finder(build("mlp"), 16)
    row = own.trials.baseline(Terms())
    monkeypatch.setattr(own.trials, "baseline", lambda terms: row)
    slow = replace(row, step=replace(row.step, seconds=2 * row.step.seconds))
    assert own.divided(row.step.peak, slow) is row
    assert own.divided(row.step.peak, row) is None
    assert own.divided(row.step.peak - 1, slow) is None
    assert own.divided(row.step.peak, replace(slow, setting=replace(row.setting, opt="adamw8bit"))) is None
    own.trials.planner.model = nn.Sequential(nn.BatchNorm2d(3))
    assert own.divided(row.step.peak, slow) is None


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
        small_plan((2,), 4, build("mlp"), budget=100_000)


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 * 2**30), ("500MiB", 500 * MIB), ("2G", 2**31), ("1.5 gb", 3 * 2**29), ("64k", 2**16), ("1000", 1000)],
)
def test_amounts_of_memory(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "8GiBs", "-1G", "0", "G", "1e9"])
def test_no_amount_of_memory_is_an_error_of_one_line(text, capsys):
    with pytest.raises(ConfigError, match="is no number of bytes; write 8GiB or 500MiB"):
        parse_bytes(text)
    for command in ("plan", "train"):
        assert main([command, f"--budget={text}"]) == 2
        error = capsys.readouterr().err
        assert "is no number of bytes" in error
        assert error.count("\n") == 1


KWARGS = ["img_size=32", "patch_size=4", "depth=2", "embed_dim=32", "num_heads=2"]
MODEL = ["--model", "test_vit", "--model-kwargs", *KWARGS, "--num-classes", "5", "--method", "greedy"]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs `localprop plan`; gives its report and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*flags):
        assert main(["plan", *MODEL, *flags, "--json", "plan.json"]) == 0
        return json.loads((tmp_path / "plan.json").read_text()), capsys.readouterr().out

    return run


def test_the_command_writes_a_table_a_picture_and_a_report(command, tmp_path):
    report, text = command("--batch-size", "64")
    assert [row["setting"] for row in report["rows"]] == ["end-to-end", "end-to-end + ckpt", "K=2, max"]
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    for row in report["rows"]:
        assert sum(row[part] for part in PARTS) == row["peak"]
        (line,) = [line for line in lines if re.match(re.escape(row["setting"]) + r" {2,}", line)]
        numbers = re.findall(r"\S+", line.removeprefix(row["setting"]))
        assert numbers[0] == f"{row['peak'] / MIB:.0f}"
        assert numbers[1] == f"{100 * row['memory_ratio']:.0f}"
        assert numbers[-1] == (str(row["peak_module"]) if row["modules"] > 1 else f"{row['time_ratio']:.2f}")
    assert report["config"]["batch_size"] == 64
    assert "choice" not in report
    for kind in ("exact", "local"):
        assert f"{kind}, the fastest" in text
        assert len(report[kind]) >= 2
        assert all(row["setting"] in text for row in report[kind])
    assert "localprop train" not in text
    assert "picture: plan.png" in lines
    pixels = matplotlib.image.imread(tmp_path / "plan.png")
    assert pixels.shape[:2] == (1400, 1400)
    assert (pixels[:, [0, 1, -2, -1]] == 1).all(), "something runs into the edge"
    upper, lower = (part.reshape(-1, 4)[:, :3] for part in (pixels[150:430, 120:1150], pixels[510:780, 120:1150]))
    colors = [np.unique(p[np.ptp(p, axis=1) > 0.1] @ [1, 256, 256**2], return_counts=True)[1] for p in (upper, lower)]
    assert (colors[0] > 500).sum() == 0  # end-to-end is grey
    assert (colors[1] > 500).sum() == 2  # a colour for each module


def test_the_command_explains_a_peak(command):
    report, text = command("--batch-size", "64", "--explain", "K=2")
    peak = report["explained"]
    (row,) = [row for row in report["rows"] if row["setting"] == peak["setting"]]
    parts = peak["tensors"] + peak["rest"]
    assert sum(part["size"] for part in parts) == peak["size"] == row["peak"]
    assert (peak["module"], peak["modules"]) == (row["peak_module"], 2)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert "K=2, max is at its peak of" in text
    assert f"module {peak['module']} of 2, in the {peak['phase']} of {peak['layer']}" in " ".join(text.split())
    start = next(i for i, line in enumerate(lines) if line.startswith("made by"))
    end = next(i for i, line in enumerate(lines) if line.startswith("in all"))
    shares = [float(re.findall(r" (\d+\.\d) ", line)[-1]) for line in lines[start + 1 : end]]
    assert len(shares) == len(parts)
    assert sum(shares) == pytest.approx(100)
    for tensor, line in zip(peak["tensors"], lines[start + 1 :], strict=False):
        assert line.startswith(tensor["layer"])
        assert "x".join(map(str, tensor["shape"])) in line


CONFIGS = [
    TrainConfig(),
    TrainConfig(
        ModelConfig("test_vit", {"depth": 3, "global_pool": "avg", "depths": (1, 2), "norm": "1", "pool": ""}),
        LocalConfig("greedy", 3, recompute=False, split_blocks=True, grad_checkpointing=True, budget="2GiB"),
        optim=OptimConfig(amp=True, clip_grad=0.5, lr=1e-4, warmup_epochs=0),
    ),
    TrainConfig(local=LocalConfig(cuts=("layers.0", "layers.1"), recompute=True, method_kwargs={"weight": 0.5})),
    TrainConfig(
        ModelConfig("resnet18", {"a": "None", "b": "x=1"}), LocalConfig("end-to-end", method_kwargs={"x": None})
    ),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_flags_give_the_settings_that_they_are_made_of(config):
    words = shlex.split(shlex.join(to_flags(config)))
    assert parse(TrainConfig, "train", words, TrainConfig()) == config


@pytest.mark.parametrize(
    "flags",
    [
        ("--batch-size", "8", "--budget", "1MiB"),
        (
            "--batch-size",
            "8",
            "--budget",
            "9MiB",
            "--modules",
            "2",
            "--precision",
            "bf16",
            "--opt",
            "lion",
            "--model-ema",
        ),
    ],
)
def test_the_printed_command_trains_what_was_chosen(command, flags):
    report, text = command(*flags)
    lines, choice = text.splitlines(), report["choice"]
    for kind in ("exact", "local"):
        fit = report[f"{kind}_fit"]
        (told,) = [line for line in lines if f", {kind}: {fit['setting']}" in line]
        assert fit["command"] + " --data folder:PATH" in lines[lines.index(told) + 1 :]
    line = choice["command"]
    words = shlex.split(line)
    assert words[:2] == ["localprop", "train"]
    config = parse(TrainConfig, "train", words[2:], TrainConfig())
    plan_config = parse(PlanConfig, "plan", [*MODEL, *flags], PlanConfig())
    assert choice["peak"] <= report["budget"] == parse_bytes(plan_config.local.budget)
    assert config.backbone == plan_config.backbone
    assert config.local.budget is None
    assert config.optim.batch_size == choice["batch_size"]
    assert (config.local.method, config.local.count or 1) == (choice["method"], choice["modules"])
    assert config.local.grad_checkpointing == choice["grad_checkpointing"]
    assert config.local.split_blocks == choice["split_blocks"]
    assert (config.local.cuts, config.local.recompute_units) == (
        tuple(choice["cuts"]) if "cuts" in choice else None,
        choice.get("recompute_units"),
    )
    assert (config.optim.opt, config.optim.model_ema) == (plan_config.opt, plan_config.model_ema)
    assert config.optim.amp == (plan_config.precision != "fp32")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--modules", "7"], "at most 2"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--model", "test_vitt"], "did you mean 'test_vit'"),
        (["--picture", "nowhere/plan.png"], "no folder"),
        (["--bugdet", "1G"], "did you mean '--budget'"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *MODEL, *flags]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["K=2", "k=2", "end-to-end", "end-to-end+ckpt"])
def test_a_setting_is_explained_under_its_name(name):
    result = small_plan((2, 99), model=build("mlp"), explain=name)
    rows = {row.setting.name: row for row in result.rows}
    peak = result.explained
    assert peak.setting.replace(" ", "").lower().startswith(name.lower())
    assert sum(part.size for part in [*peak.tensors, *peak.rest]) == peak.size == rows[peak.setting].step.peak


def test_nothing_is_explained_unasked(monkeypatch):
    monkeypatch.setattr("localprop.planning.planner.explain_peak", lambda *_: pytest.fail("which takes time"))
    assert small_plan((2,), model=build("mlp")).explained is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("four", "explain is 'four'; give the name of a setting, such as end-to-end or K=4"),
        (
            "K=5",
            "this plan has no setting 'K=5' to explain; it has end-to-end, end-to-end + ckpt, K=2; --modules plans",
        ),
    ],
)
def test_an_unknown_setting_to_explain_is_one_line(name, words):
    with pytest.raises(ConfigError) as caught:
        small_plan((2,), model=build("mlp"), explain=name)
    assert str(caught.value).startswith(words)


def test_settings_that_the_model_does_not_allow_are_named_with_the_reason(command):
    left_out = small_plan((2, 99), model=build("mlp")).left_out
    assert left_out.keys() == {"K=99"}
    assert left_out["K=99"].startswith("99 modules asked for, but the backbone has")
    report, text = command()
    assert "left out, since the model has too few blocks: K=4, K=8" in text
    assert all("modules asked for" in why for why in report["left_out"].values())


def test_the_old_name_of_a_rows_step_warns():
    row = small_plan((2,), model=build("mlp")).rows[0]
    with pytest.warns(DeprecationWarning, match="PlanRow.step"):
        assert row.trace is row.step


class Whole(nn.Module):
    """Two tensors are alive all the way, so there is no place to cut."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3072, CLASSES), nn.Linear(3072, CLASSES)

    def forward(self, x):
        x = x.flatten(1)
        return self.left(x) * self.right(x)


def test_a_model_that_cannot_be_cut_is_planned_for_exact_training():
    result = plan(Whole(), 4, input_size=SIZE, budget=2**30, show="fronts")
    assert names(result.rows) == ["end-to-end", "end-to-end + ckpt"]
    assert result.exact[-1] is result.exact_fit is result.choice is result.rows[0]
    assert (result.local, result.local_fit) == ([], None)
    assert result.left_out.keys() == {"K=2", "K=4", "K=8"}
