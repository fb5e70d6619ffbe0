"""Every promised backbone as a local network: the same logits bit for bit, and isolated gradients, at K=2 and K=max."""

import pytest
import torch

from backbones import IMAGE, OTHERS, TIMM, cut
from localprop import localize
from localprop.division import divide


def _output(model, function, images):
    """The output of one pass with a fixed seed; the model's buffers are left as they were."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(1)
    with torch.no_grad():
        output = function(images)
    model.load_state_dict(before)
    return output


@pytest.mark.parametrize("modules", ["two", "all"])
@pytest.mark.parametrize("name", [*TIMM, *OTHERS])
def test_local_network_is_the_model_and_isolates_gradients(monkeypatch, name, modules):
    model, units = cut(name)
    monkeypatch.setattr(divide, "chain", lambda *_, **__: units)  # tracing once takes longer than all the rest
    keys = list(model.state_dict())
    cuts = [unit.name for unit in units[:-1]] if modules == "all" else [units[len(units) // 2 - 1].name]
    net = localize(model, method="greedy", head="linear", cuts=cuts, input_size=IMAGE)
    count = len(net.local_modules)
    assert net.backbone is model
    assert list(model.state_dict()) == keys
    assert count == (2 if modules == "two" else len(units))
    assert [name for module in net.local_modules for name in module.units] == [unit.name for unit in units]

    images, labels = torch.randn(2, *IMAGE), torch.tensor([1, 3])
    for training in (False, True):
        net.train(training)
        assert torch.equal(_output(model, net, images), _output(model, model, images))

    parameters = dict(net.named_parameters())
    own = [{id(p) for p in module.parameters()} for module in net.local_modules]
    reached: list[set[int]] = []

    def record(k, loss):
        reached.append({id(p) for p in parameters.values() if p.grad is not None})
        net.zero_grad()

    out = net.backward(images, labels, after_module=record)
    assert out.losses.isfinite().all()
    assert len(reached) == count
    for k, ids in enumerate(reached):
        assert ids, f"module {k} learns nothing"
        assert ids <= own[k], f"module {k}'s loss reaches another module"
