"""Plans: what each setting takes."""

import copy
import itertools

import pytest
import torch
from torch import nn

from localprop import localize, plan
from localprop.errors import ChainError, ConfigError, LocalpropError
from localprop.memory.cuda import matrix_product_buffers
from localprop.planning.simulation import simulate_step
from localprop.settings.config import OptimConfig
from small_plans import names, small_plan, vit
from tiny import CLASSES, SIZE, build


@pytest.fixture(scope="module")
def result():
    return small_plan()


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
    assert names(
        [plan(build("mlp"), 4, method="end-to-end", input_size=SIZE, budget=two.peak, show="fits").choice]
    ) != ["end-to-end"]


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


def test_settings_that_the_model_does_not_allow_are_named_with_the_reason():
    left_out = small_plan((2, 99), model=build("mlp")).left_out
    assert left_out.keys() == {"K=99"}
    assert left_out["K=99"].startswith("99 modules asked for, but the backbone has")


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
