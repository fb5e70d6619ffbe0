"""Costs found on fake tensors against what autograd keeps of real ones."""

import pytest
import timm
import torch

from localprop import chain
from localprop.cost import Cost, auxiliary_cost, unit_costs
from tiny import MODELS, SIZE, batch, build, kept_bytes, split, units_of

BATCH = 32


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", MODELS)
def test_the_units_together_keep_what_the_model_keeps(name):
    model, (images, _) = build(name).train(), batch(BATCH)
    costs = unit_costs(model, units_of(name))
    assert sum(costs, Cost(0, 0)).saved * BATCH == pytest.approx(kept_bytes(lambda: model(images), model), rel=0.01)
    assert sum(c.parameters for c in costs) == sum(p.numel() * 4 for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["feature-reconstruction", "infopro"])
def test_every_local_module_keeps_what_its_parts_keep(name, method):
    model, (images, labels) = build(name).train(), batch(BATCH)
    net, units = split(name, method=method, model=model), units_of(name)
    costs = dict(zip([unit.name for unit in units], unit_costs(model, units), strict=True))
    shapes = {unit.name: unit.shape for unit in units}
    features, context = images, {}
    for module in net.local_modules:
        own = sum((costs[unit] for unit in module.units), Cost(0, 0))
        output = module(features.clone(), dict(context)).detach().requires_grad_()
        kept = kept_bytes(lambda m=module, x=features: m(x, context), model, but=lambda result: result)
        assert own.saved * BATCH == pytest.approx(kept, rel=0.01)

        found = auxiliary_cost(module.auxiliary, shapes[module.units[-1]], tuple(features.shape[1:]), SIZE)
        arguments = (output, features, images, labels)
        kept = kept_bytes(lambda m=module, a=arguments: m.auxiliary(*a), module.auxiliary)
        assert found.saved * BATCH == pytest.approx(kept, rel=0.01)
        assert found.parameters == sum(p.numel() * 4 for p in module.auxiliary.parameters())
        features = output.detach()


def test_frozen_weights_have_no_gradients():
    model = build("vit")
    before = unit_costs(model, units_of("vit"))
    model.blocks[1].requires_grad_(False)
    after = unit_costs(model, units_of("vit"))
    assert [c.parameters for c in after] == [c.parameters if i != 2 else 0 for i, c in enumerate(before)]
    assert after[2].saved < before[2].saved


def test_half_precision_costs_half():
    model = build("cnn")
    full = sum(unit_costs(model, units_of("cnn")), Cost(0, 0))
    half = sum(unit_costs(model.half(), units_of("cnn")), Cost(0, 0))
    assert half.parameters == full.parameters / 2
    assert half.saved == pytest.approx(full.saved / 2, rel=0.01)


def test_costs_need_no_memory_and_leave_the_model_alone():
    with torch.device("meta"):
        model = timm.create_model("vit_large_patch16_224", img_size=64, depth=2).eval()
    costs = unit_costs(model, chain(model))
    assert sum(c.parameters for c in costs) == sum(p.numel() * 4 for p in model.parameters())
    assert not model.training
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_bytes_are_those_of_a_batch_and_of_gradients():
    assert (Cost(10, 7) + Cost(2.5, 1)).bytes(batch_size=4) == 4 * 12.5 + 8
