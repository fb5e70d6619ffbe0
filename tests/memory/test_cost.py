"""Costs found on fake tensors against real steps, and peaks composed of them against simulated ones."""

import copy
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import timm
import torch
from torch import nn

import localprop.memory.cost
from adapters import adapted, chain_of, needs_peft
from localprop import chain
from localprop.division.divide import division_of
from localprop.errors import ConfigError
from localprop.features import Example
from localprop.memory.cost import Costs, End, module_end, module_peak, unit_costs
from localprop.memory.part import Conditions, Cost
from localprop.planning.simulation import simulate_step
from localprop.settings.config import OptimConfig
from localprop.settings.recipe import Recipe
from tiny import CUTS, SIZE, batch, build, module_peaks, split, traced_once, units_of

BATCH = 16
IMAGES = BATCH * math.prod(SIZE) * 4


LABEL = Example((), torch.int64)


def composed(net, name, conditions, grad_checkpointing=False):
    """For each module: its input's bytes, and its peak beside it, as composed of its parts' costs."""
    units, found, given = units_of(name), [], IMAGES
    costs = Costs(net.backbone, units)
    others = replace(conditions, recomputation="whole") if grad_checkpointing else conditions
    start = 0
    for module in net.local_modules:
        stop = start + len(module.units)
        kinds = [conditions if i == stop - 1 else others for i in range(start, stop)]
        own = [costs.units(replace(kind, input_gradient=i > start))[i] for i, kind in enumerate(kinds, start)]
        shapes = [units[end - 1].shape if end else SIZE for end in (stop, start)]
        auxiliary = costs.auxiliary(module.local_loss, *shapes, LABEL, conditions)
        found.append((given, module_peak(own, module_end(auxiliary, own[-1].output))))
        start, given = stop, own[-1].output
    return found


CASES = [(name, "greedy", False) for name in ("resnet", "mlp", "cnn")]
CASES += [("swin", "greedy", True), ("vit", "infopro", True), ("vit", "greedy", False)]
CASES += [("swin", "auglocal", True), ("vit", "auglocal", False), ("resnet", "auglocal", False)]


@pytest.mark.parametrize(("name", "method", "recompute"), CASES)
def test_a_modules_peak_is_that_of_its_real_step(name, method, recompute):
    net = split(name, method=method, recompute=recompute).train()
    peaks = [peak for _, peak in composed(net, name, Conditions(BATCH, recomputation="cheap" if recompute else "none"))]
    # Exact, mostly; but a layer norm that ends a unit is not kept by the next one, for that knows where it comes from.
    assert peaks == pytest.approx(module_peaks(net, *batch(BATCH)), rel=0.06, abs=4096)


PLAIN = Conditions(BATCH, recomputation="cheap")
HALF = replace(PLAIN, amp_dtype=torch.bfloat16)


@pytest.mark.parametrize(("name", "conditions"), [("swin", PLAIN), ("vit", HALF), ("resnet", HALF), ("cnn", PLAIN)])
def test_the_largest_peak_is_that_of_the_simulated_step(name, conditions):
    checkpointing = conditions is HALF
    net = split(name, grad_checkpointing=checkpointing)
    step = simulate_step(net, OptimConfig(amp=conditions.amp_dtype is not None), BATCH, SIZE)
    static = step.parts["parameters"] + step.parts["optimizer"]
    assert static + max(map(sum, composed(net, name, conditions, checkpointing))) == pytest.approx(step.peak, rel=0.04)


@pytest.mark.parametrize(
    ("name", "conditions", "less"),
    [("swin", PLAIN, 0.01), ("vit", HALF, 0.04), ("resnet", HALF, 0.08), ("cnn", PLAIN, 0.01)],
)
def test_the_largest_peak_of_exact_training_is_that_of_the_simulated_step(name, conditions, less):
    net, units = split(name, method="end-to-end", recompute=True), units_of(name)
    step = simulate_step(net, OptimConfig(amp=conditions.amp_dtype is not None), BATCH, SIZE)
    costs, peaks, start, waiting = Costs(net.backbone, units), [], 0, IMAGES
    for module in net.local_modules:
        stop = start + len(module.units)
        own = [costs.units(replace(conditions, input_gradient=i > 0))[i] for i in range(start, stop)]
        end = End(own[-1].output, 0, own[-1].output)
        if stop == len(units):
            loss = costs.auxiliary(module.local_loss, units[stop - 1].shape, units[start - 1].shape, LABEL, conditions)
            end = module_end(loss, own[-1].output)
        peaks.append(waiting + module_peak(own, end))
        start, waiting = stop, waiting + own[-1].output
    composed = step.parts["parameters"] + step.parts["optimizer"] + max(peaks)
    # Less where a first unit takes the images in another type, and does not keep them.
    assert (1 - less) * composed <= step.peak <= 1.01 * composed
    assert peaks.index(max(peaks)) == step.module


FROZEN = [
    ("vit", ("patch_embed", "blocks.0")),
    ("resnet", ("conv1", "layer1", "layer2")),
    ("cnn", ("0",)),
    ("vit", ("blocks.2",)),
]


@pytest.mark.parametrize("method", ["greedy", "end-to-end"])
@pytest.mark.parametrize(("name", "freeze"), FROZEN)
def test_a_module_with_frozen_units_costs_what_its_step_takes(name, freeze, method):
    with traced_once(name):
        recipe = Recipe(method=method, cuts=tuple(CUTS[name][2]), freeze=freeze)
        check_division(division_of(build(name), recipe, input_size=SIZE, batch_size=BATCH), name == "cnn")


@needs_peft
@pytest.mark.parametrize("method", ["greedy", "end-to-end"])
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_a_module_with_adapters_costs_what_its_step_takes(name, method):
    model = adapted(name)
    recipe, costs = Recipe(method=method, cuts=tuple(CUTS[name][2])), Costs(model, chain_of(name))
    division = division_of(model, recipe, costs, batch_size=BATCH)
    check_division(division)
    unit = next(unit for unit in division.units if unit.depth)
    pairs = [p for p in unit.used(model, nn.Module.parameters) if p.requires_grad]
    assert 0 < costs.unit(1, division.step).gradients == sum(p.nbytes for p in pairs)


@needs_peft
def test_batch_norm_of_a_model_with_adapters_uses_its_statistics():
    """So one image is enough, which is one pixel in the last stage."""
    with pytest.raises(ConfigError, match="batch norm"):
        unit_costs(build("resnet"), units_of("resnet"), Conditions(1))
    assert len(unit_costs(adapted("resnet"), chain_of("resnet"), Conditions(1))) == len(units_of("resnet"))


def check_division(division, images_wait=False):
    """The costs of modules of which some are frozen, against a simulated step."""
    ends = division.ends()
    costs = [division.cost(k, start, stop, "memory") for k, (start, stop) in enumerate(pairwise([0, *ends]))]
    net = division.build(ends)
    step = simulate_step(net, OptimConfig(), BATCH, SIZE)
    static = step.parts["parameters"] + step.parts["optimizer"] + IMAGES
    crossing = BATCH * math.prod(net.local_modules[0].output_shape) * 4
    # In exact training the images stay for the first module, which runs again.
    beside = [0, crossing if net.exact else crossing - IMAGES]
    peaks = [static + own + other for own, other in zip(costs, beside, strict=True)]
    # But where nothing needs them for its backward.
    unneeded = IMAGES if net.exact and images_wait else 0
    assert 0.97 * (max(peaks) - unneeded) <= step.peak <= 1.03 * max(peaks)


def sequential():
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 5))


def costs_of(model, **conditions):
    return unit_costs(model, chain(model, SIZE), Conditions(BATCH, **conditions))


def test_costs_of_known_layers():
    first, second, last = costs_of(sequential())
    assert [c.output for c in (first, second, last)] == [BATCH * width * 4 for width in (64, 48, 5)]
    assert [c.gradients for c in (first, second, last)] == [4 * (i + 1) * o for i, o in ((3072, 64), (64, 48), (48, 5))]
    # ReLU and tanh keep their result, which is the output; a linear layer its input.
    assert [c.kept for c in (first, second, last)] == pytest.approx([0] * 3, abs=4)  # a scalar to begin backward with
    assert [(c.keeps_input, c.keeps_output) for c in (first, second, last)] == [(True, True)] * 2 + [(True, False)]
    assert first.forward == 2 * first.output
    # The gradient of what ReLU was given, of the weights, and of the input.
    assert first.backward == pytest.approx(first.output + first.gradients + IMAGES, abs=8)
    assert costs_of(sequential(), input_gradient=False)[0].backward == first.backward - IMAGES


def test_costs_follow_the_conditions():
    model, units = build("vit"), units_of("vit")
    plain = unit_costs(model, units, Conditions(BATCH))[1]
    more = unit_costs(model, units, Conditions(2 * BATCH))[1]
    half = unit_costs(model, units, Conditions(BATCH, torch.bfloat16))[1]
    again = unit_costs(model, units, Conditions(BATCH, recomputation="cheap"))[1]
    checkpointed = unit_costs(model, units, Conditions(BATCH, recomputation="whole"))[1]
    assert more.kept == pytest.approx(2 * plain.kept, rel=0.01)
    assert more.gradients == plain.gradients == half.gradients
    assert half.kept < 0.7 * plain.kept
    assert again.kept < 0.95 * plain.kept
    assert again.seconds > plain.seconds
    assert checkpointed.kept < 0.05 * plain.kept  # the state of the random numbers
    assert checkpointed.keeps_input
    assert checkpointed.backward == pytest.approx(plain.backward, rel=0.05)
    assert checkpointed.seconds > 1.2 * plain.seconds


def test_a_unit_that_runs_again_has_the_same_kernels_then():
    """On CUDA the attention of a checkpointed block is replaced in both of its runs."""
    model, units = build("vit"), units_of("vit")
    plain, whole = (
        unit_costs(model, units, Conditions(BATCH, torch.bfloat16, recomputation, "cuda"))[1]
        for recomputation in ("none", "whole")
    )
    assert whole.kept < 0.05 * plain.kept
    assert whole.seconds > plain.seconds


def test_frozen_weights_have_no_gradients():
    model = build("vit")
    before = unit_costs(model, units_of("vit"), Conditions(BATCH))
    model.blocks[1].requires_grad_(False)
    after = unit_costs(model, units_of("vit"), Conditions(BATCH))
    assert [c.gradients for c in after] == [c.gradients if i != 2 else 0 for i, c in enumerate(before)]
    assert after[2].kept < before[2].kept


def test_half_precision_costs_half():
    model = build("cnn")
    full = unit_costs(model, units_of("cnn"), Conditions(BATCH))
    half = unit_costs(model.half(), units_of("cnn"), Conditions(BATCH))
    for a, b in zip(full, half, strict=True):
        assert (b.gradients, b.output) == (a.gradients / 2, a.output / 2)
        assert b.kept == pytest.approx(a.kept / 2, rel=0.01, abs=4)


def test_costs_need_no_memory_and_leave_the_model_alone():
    with torch.device("meta"):
        model = timm.create_model("vit_large_patch16_224", img_size=64, depth=2).eval()
    costs = unit_costs(model, chain(model), Conditions())
    assert sum(c.gradients for c in costs) == sum(p.numel() * 4 for p in model.parameters())
    assert not model.training
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert all(p.grad is None for p in model.parameters())


def test_each_cost_is_found_once(monkeypatch):
    net, units, asked = split("cnn", method="greedy"), units_of("cnn"), []
    costs = Costs(net.backbone, units)
    for name in ("part_cost", "auxiliary_cost"):
        real = getattr(localprop.memory.cost, name)

        def ask(*args, name=name, real=real):
            asked.append(name)
            return real(*args)

        monkeypatch.setattr(localprop.memory.cost, name, ask)
    loss = [module.local_loss for module in net.local_modules]
    for conditions in (Conditions(8), Conditions(8), Conditions(9)):
        costs.unit(1, conditions)
        for auxiliary, shape in zip(loss[:2], ((12, 16, 16), (16, 8, 8)), strict=True):
            for own in (auxiliary, copy.deepcopy(auxiliary)):
                costs.auxiliary(own, shape, SIZE, LABEL, conditions)
    # All units once for what they are given, and then the one that is asked for; each loss, which costs a part too.
    once = [*["part_cost"] * (len(units) + 1), *["auxiliary_cost", "part_cost"] * 2]
    assert asked == once * 2


def test_a_units_cost_does_not_depend_on_what_was_asked_before():
    model, units = build("vit"), units_of("vit")
    costs = Costs(model, units)
    waiting = replace(PLAIN, gradients_wait=True)
    for conditions in (replace(waiting, recomputation="whole/4"), waiting, PLAIN, replace(waiting, batch_size=8)):
        assert costs.units(conditions) == unit_costs(model, units, conditions)


def cost(kept=0, forward=0, backward=0, output=0, keeps_input=False, keeps_output=False, gradients=0):
    return Cost(kept, forward, backward, output, keeps_input, keeps_output, gradients, 0.0)


def peak(units, loss):
    return module_peak(units, module_end(loss, units[-1].output))


def test_a_peak_may_be_anywhere():
    loss = cost(forward=7, backward=9, gradients=2)
    a, b = cost(kept=10, forward=15, backward=20, output=4, gradients=3), cost(5, 8, 12, output=6, keeps_input=True)
    # In backward of b: a has kept 10 and its output, and there are the loss's gradients and the module's output.
    assert peak([a, b], loss) == 10 + 4 + 12 + 2 + 6
    assert peak([a, replace(b, forward=30)], loss) == 10 + 4 + 30
    assert peak([a, replace(b, forward=30, keeps_input=False)], loss) == 10 + 4 + 30
    assert peak([a, b], replace(loss, backward=90)) == 10 + 4 + 5 + 6 + 90
    assert peak([a, b], replace(loss, forward=90)) == 10 + 4 + 5 + 6 + 90
    # In backward of a: what b kept is gone, its gradients are there.
    assert peak([a, replace(b, gradients=50)], loss) == 20 + 2 + 50 + 6
    # An output that its unit needs for its own backward is there once, whoever else keeps it.
    assert peak([a, replace(b, keeps_input=False)], loss) == 10 + 12 + 2 + 6
    assert peak([replace(a, keeps_output=True), b], loss) == 10 + 4 + 12 + 2 + 6
    assert peak([replace(a, keeps_output=True), replace(b, gradients=50)], loss) == 20 + 4 + 2 + 50 + 6
    assert peak([a, replace(b, keeps_output=True)], loss) == 10 + 4 + 12 + 2 + 6
