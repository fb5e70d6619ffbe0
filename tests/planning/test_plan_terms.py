"""What a budget changes where nothing fits otherwise: states in 8 bits or on the host, micro-batches."""

from dataclasses import replace

import pytest
from torch import nn

from localprop import Plan, localize
from localprop.planning.planner import optim_of
from localprop.planning.reporting import plan_lines
from localprop.planning.search.trials import Terms
from localprop.planning.simulation import simulate_step
from localprop.settings.config import OptimConfig
from localprop.settings.plan import PlanConfig
from small_plans import finder, small_plan
from tiny import CLASSES, SIZE, build


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
