"""What a plan knows of boundaries that rest on the host."""

import math
from dataclasses import replace
from itertools import accumulate

import pytest
from torch import nn

from localprop import localize, plan
from localprop.memory.speed import MACHINES
from localprop.planning.plans import Plan
from localprop.planning.reporting import plan_lines
from localprop.planning.search.trials import Terms
from localprop.planning.simulation import record_step, simulate_step
from localprop.settings.config import OptimConfig
from localprop.settings.plan import PlanConfig
from small_plans import finder as finder_of
from tiny import CLASSES, SIZE, split

BATCH = 16
AWAY = OptimConfig(opt="sgd", offload_boundaries=True)


@pytest.mark.parametrize("name", ["vit", "swin", "resnet"])
def test_the_peak_is_without_the_inputs_of_modules_before(name):
    net, here = split(name, 3, "end-to-end"), replace(AWAY, offload_boundaries=False)
    record = record_step(net, here, BATCH, SIZE)
    # What the modules take: the images, and what the modules before them give.
    shapes = [SIZE, *(module.output_shape for module in net.local_modules)]
    before = [0, *accumulate(4 * BATCH * math.prod(shape) for shape in shapes)]
    resting = [before[record.order[turn]] for turn in record.turns]
    peak = max(used - away for used, away in zip(record.in_use, resting, strict=True))
    assert simulate_step(net, AWAY, BATCH, SIZE).peak == peak


def test_a_module_waits_for_its_boundary(monkeypatch):
    net, copies = split("vit", 3, "end-to-end"), []
    for link in (1e6, 1e12):
        monkeypatch.setitem(MACHINES, "cuda", replace(MACHINES["cuda"], host_link=link))
        copies.append(simulate_step(net, AWAY, BATCH, SIZE, "cuda").seconds)
    shapes = [SIZE, *(module.output_shape for module in net.local_modules[:2])]
    # The images go; what the first two modules give goes and comes; and so do the images.
    moved = 2 * sum(4 * BATCH * math.prod(shape) for shape in shapes[:2])
    assert copies[0] == pytest.approx(moved / 1e6, rel=0.05)
    assert copies[1] < 0.1 * copies[0]


def wide():
    """A model whose boundaries take more than what each layer keeps."""
    layers = [layer for _ in range(6) for layer in (nn.Conv2d(16, 16, 1), nn.ReLU())]
    return nn.Sequential(nn.Conv2d(3, 16, 1), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))


def finder(device="cuda", **changes):
    return finder_of(wide(), BATCH, device, opt="sgd", **changes)


def test_they_rest_on_the_host_where_nothing_else_fits():
    own, asked = finder(), finder(offload_boundaries=True)
    trials = own.trials
    ways = trials.ways("exact", Terms())
    least = trials.row(
        "exact", ways.fastest(1.001 * ways.least(trials.states(Terms())), trials.states(Terms())), Terms()
    )
    limit = least.peak - 8 * BATCH * 1024
    row = own.fitting("exact", limit)
    assert row.setting.offload == ("boundaries",)
    assert row.setting.same_numbers
    assert row.step.peak <= limit
    net = localize(
        wide(),
        cuts=row.setting.recipe.cuts,
        split_blocks=True,
        method="end-to-end",
        input_size=SIZE,
        recompute_units=row.setting.recipe.recompute_units,
    )
    assert row.step == simulate_step(net, AWAY, BATCH, SIZE, "cuda")
    lines = plan_lines(PlanConfig(batch_size=BATCH), Plan([row], budget=2**30, exact_fit=row))
    assert any("--offload-boundaries" in line for line in lines)
    assert asked.fitting("exact", limit).step == row.step
    assert asked.trials.offloads("exact") == [(), ("optimizer",)]
    assert own.trials.offloads("exact") == [(), ("boundaries",), ("boundaries", "optimizer")]
    assert own.trials.offloads("local") == [(), ("optimizer",)]
    assert finder("cpu").trials.offloads("exact") == [()]


@pytest.mark.parametrize("kind", ["exact", "local"])
def test_a_front_goes_from_the_least_memory_to_the_fastest_where_states_take_most(kind):
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(3072, 3072) for _ in range(4)), nn.Linear(3072, CLASSES))
    result = plan(model, batch_size=BATCH, input_size=SIZE, device="cuda", show="fronts")
    rows = getattr(result, kind)
    assert "offload" in rows[0].setting.name
    assert not rows[-1].setting.offload
    assert rows[0].peak < 0.7 * rows[-1].peak
    assert rows[-1].seconds < rows[0].seconds
