"""The local network: the backbone's own function, and gradients that stay in their module."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from localprop import localize
from localprop.errors import ChainError
from localprop.seeding import derive_seed
from tiny import MODELS, SIZE, assert_same, batch, build, gradients, split, traced_once, units_of

every_model = pytest.mark.parametrize("name", MODELS)


@every_model
@pytest.mark.parametrize("most", [False, True])
def test_the_network_computes_what_the_backbone_does(name, most):
    model, images = build(name), batch()[0]
    keys = list(model.state_dict())
    modules = len(units_of(name)) if most else 2
    net = localize(model, modules, min_depth=0, input_size=SIZE) if most else split(name, 2, model=model)
    assert len(net.local_modules) == modules
    model.eval()
    assert torch.equal(net(images), model(images))
    model.train()
    outputs = []
    for function, seed in [(model, 1), (net, 1), (model, 2)]:
        torch.manual_seed(seed)
        outputs.append(function(images))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])  # dropout was on
    assert net.backbone is model
    assert list(model.state_dict()) == keys


@every_model
def test_every_parameter_is_there_once(name):
    model = build(name)
    net = split(name, model=model)
    everything = [id(p) for p in net.parameters()]
    auxiliary = [id(p) for module in net.local_modules for p in module.local_loss.parameters()]
    assert sorted(everything) == sorted([*(id(p) for p in model.parameters()), *auxiliary])
    assert len(set(everything)) == len(everything) == len(list(net.named_parameters(remove_duplicate=False)))
    assert sorted(id(p) for module in net.local_modules for p in module.parameters()) == sorted(everything)
    stored = [t.data_ptr() for t in net.state_dict().values()]
    assert len(set(stored)) == len(stored)
    names = [n for module in net.local_modules for n, _ in module.named_parameters() if not n.startswith("auxiliary.")]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())


def test_a_weight_shared_by_two_layers_is_one_modules():
    layers = [nn.Linear(3072, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)]
    layers[3].weight = layers[1].weight
    model = nn.Sequential(nn.Flatten(), *layers)
    net = localize(model, 3, "greedy", input_size=SIZE)
    owned = [id(p) for module in net.local_modules for p in module.parameters()]
    assert sorted(owned) == sorted(id(p) for p in net.parameters())
    with pytest.raises(ChainError, match="at most 3"):
        localize(model, 4, "greedy", input_size=SIZE)


@pytest.mark.parametrize(("name", "autocast"), [("swin", False), ("vit", False), ("vit", True), ("cnn", True)])
def test_one_module_is_ordinary_training(name, autocast):
    reference, model = build(name), build(name)
    net = localize(model, method="end-to-end", input_size=SIZE)

    def region():
        return torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()

    ours = torch.optim.AdamW(net.local_modules[0].parameters(), lr=1e-2)
    plain = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    for step in range(5):
        images, labels = batch(seed=step)
        torch.manual_seed(step)
        with region():
            net.backward(images, labels)
        nn.utils.clip_grad_norm_(net.local_modules[0].parameters(), 0.5)
        ours.step()
        ours.zero_grad()

        torch.manual_seed(step)
        with region():
            loss = F.cross_entropy(reference(images), labels)
        plain.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        plain.step()
    assert_same(model.state_dict(), reference.state_dict())


@pytest.mark.parametrize("name", ["swin", "vit", "resnet"])
@pytest.mark.parametrize("method", ["feature-reconstruction", "infopro"])
def test_gradients_are_those_of_each_local_loss_alone(name, method):
    net, (images, labels) = split(name, method=method), batch()
    output = net.backward(images, labels, seed=7)
    features, context = images, {}
    for k, module in enumerate(net.local_modules):
        torch.manual_seed(derive_seed(7, "module", k))
        result = module(features, context)
        loss, logits = module.local_loss(result, features, images, labels)
        parameters = dict(module.named_parameters())
        expected = torch.autograd.grad(loss, list(parameters.values()))
        assert_same({n: p.grad for n, p in parameters.items()}, dict(zip(parameters, expected, strict=True)))
        assert torch.equal(output.losses[k], loss)
        assert torch.equal(output.predictions[k], logits)
        features = result.detach()


SLICES = {"mlp": [(0, 4), (4, 7), (7, 10)], "cnn": [(0, 3), (3, 7), (7, 13)]}


@pytest.mark.parametrize("name", SLICES)
def test_gradients_are_those_of_the_slices_of_a_sequential(name):
    model, (images, labels) = build(name).eval(), batch()
    net = split(name, method="greedy", model=model)
    net.backward(images, labels)
    ours = gradients(net)
    net.zero_grad()
    features = images
    for bounds, module in zip(SLICES[name], net.local_modules, strict=True):
        result = model[slice(*bounds)](features)
        logits = result if module is net.local_modules[-1] else module.local_loss.head(result)
        F.cross_entropy(logits, labels).backward()
        features = result.detach()
    assert_same(ours, gradients(net))


@every_model
def test_a_module_touches_no_gradients_but_its_own(name):
    net = split(name)
    calls = []

    def after_module(k, loss):
        calls.append((k, loss))
        for j, module in enumerate(net.local_modules):
            for parameter_name, p in module.named_parameters():
                assert (p.grad is not None) == (j == k), parameter_name
        net.local_modules[k].zero_grad()

    output = net.backward(*batch(), after_module=after_module)
    assert [k for k, _ in calls] == [0, 1, 2]
    assert torch.equal(torch.stack([loss for _, loss in calls]), output.losses)
    assert not output.losses.requires_grad
    assert not any(logits.requires_grad for logits in output.predictions)


@pytest.mark.parametrize("name", ["swin", "cnn"])
def test_stepping_module_by_module_equals_stepping_at_the_end(name):
    weights = []
    for early in (True, False):
        net = split(name)
        optimizers = [torch.optim.AdamW(module.parameters(), lr=1e-2) for module in net.local_modules]

        def step(k, loss=None, optimizers=optimizers):
            optimizers[k].step()
            optimizers[k].zero_grad()

        for i in range(2):
            net.backward(*batch(seed=i), seed=i, after_module=step if early else None)
            if not early:
                for k in range(3):
                    step(k)
        weights.append(net.state_dict())
    assert_same(*weights)


def test_gradients_are_added_up():
    net, (images, labels) = split("mlp").eval(), batch()
    net.backward(images, labels)
    once = gradients(net)
    net.backward(images, labels)
    assert_same(gradients(net), {name: 2 * gradient for name, gradient in once.items()})


def test_random_numbers_depend_on_the_seed_and_the_module_alone():
    def run(seed, cuts=("1", "4"), draws=0):
        model = build("mlp")
        torch.manual_seed(1)
        with traced_once("mlp"):
            net = localize(model, cuts=cuts, input_size=SIZE)
        torch.manual_seed(draws)
        net.backward(*batch(), seed=seed, after_module=lambda k, loss: torch.rand(draws))
        return [{n: p.grad for n, p in module.named_parameters()} for module in net.local_modules]

    first, second, third = run(seed=3)
    for again, expected in zip(run(seed=3, draws=5), (first, second, third), strict=True):
        assert_same(again, expected)
    # Other modules after it, the same random numbers in it.
    assert_same(run(seed=3, cuts=["1"])[0], first)
    for other in (run(seed=4), run(seed=None)):
        assert not torch.equal(other[0]["1.weight"], first["1.weight"])
    assert not torch.equal(run(seed=None)[1]["4.weight"], run(seed=None, draws=5)[1]["4.weight"])


def test_modules_draw_different_random_numbers():
    model = nn.Sequential(
        nn.Flatten(), *(nn.Linear(3072, 8), nn.Dropout()), *(nn.Linear(8, 8), nn.Dropout()), nn.Linear(8, 5)
    )
    net = localize(model, method="greedy", cuts=["1", "3"], input_size=SIZE)
    masks = []
    for i in (2, 4):
        model[i].register_forward_hook(lambda module, inputs, output: masks.append(output == 0))
    net.backward(*batch(), seed=0)
    assert not torch.equal(*masks)


def test_a_scaler_scales_every_local_loss():
    net, (images, labels) = split("cnn").eval(), batch()
    plain = net.backward(images, labels)
    expected = {name: 1024 * gradient for name, gradient in gradients(net).items()}
    net.zero_grad()
    scaled = net.backward(images, labels, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    assert_same(gradients(net), expected)
    assert torch.equal(scaled.losses, plain.losses)


def test_a_scaler_skips_the_step_of_a_module_with_infinite_gradients():
    def criterion(logits, labels):
        return F.cross_entropy(logits, labels) * (float("inf") if logits is last[0] else 1)

    last = [None]
    net = split("mlp", method="greedy", criterion=criterion)
    net.local_modules[1].local_loss.head.register_forward_hook(
        lambda module, inputs, output: last.__setitem__(0, output)
    )
    before = copy.deepcopy(net.state_dict())
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in net.local_modules]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    net.backward(*batch(), scaler=scaler, after_module=lambda k, loss: scaler.step(optimizers[k]))
    scaler.update()
    changed = [
        any(not torch.equal(before[f"backbone.{n}"], p) for n, p in m.named_parameters() if n[0] != "a")
        for m in net.local_modules
    ]
    assert changed == [True, False, True]
    assert scaler.get_scale() == 4.0


def test_backward_runs_outside_of_autocast():
    seen = []

    def criterion(logits, labels):
        assert logits.dtype == torch.bfloat16
        logits.register_hook(lambda gradient: seen.append(torch.is_autocast_enabled("cpu")))
        return F.cross_entropy(logits, labels)

    net = split("mlp", criterion=criterion)
    with torch.autocast("cpu", torch.bfloat16):
        output = net.backward(*batch())
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False] * 3
    assert output.losses.dtype == torch.float32


@pytest.mark.parametrize("cuts", [(), ("4",)])
@pytest.mark.parametrize("grad_checkpointing", [False, True])
def test_a_step_inside_one_autocast_region_is_seen_by_the_next_batch(cuts, grad_checkpointing):
    weights = []
    for together in (True, False):
        torch.manual_seed(1)
        with traced_once("mlp"):
            net = localize(build("mlp"), cuts=cuts, input_size=SIZE, grad_checkpointing=grad_checkpointing)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with torch.autocast("cpu", torch.bfloat16) if together else nullcontext():
            for step in range(3):
                with nullcontext() if together else torch.autocast("cpu", torch.bfloat16):
                    net.backward(*batch(seed=step), seed=step)
                optimizer.step()
                optimizer.zero_grad()
        weights.append(net.state_dict())
    assert_same(*weights)


@every_model
def test_module_predictions_are_those_of_every_head(name):
    net, (images, labels) = split(name).eval(), batch()
    output = net.backward(images, labels)
    logits = net.module_predictions(images)
    assert [x.shape for x in logits] == [(4, 5)] * 3
    assert all(torch.equal(a, b) for a, b in zip(logits, output.predictions, strict=True))
    assert torch.equal(logits[-1], net.backbone(images))
    assert torch.equal(output.logits, logits[-1])


@every_model
def test_a_copy_is_independent(name):
    net = split(name).eval()
    images, labels = batch()
    before, weights = net(images), copy.deepcopy(net.state_dict())
    other = copy.deepcopy(net)
    assert torch.equal(other(images), before)
    assert sorted(id(p) for m in other.local_modules for p in m.parameters()) == sorted(map(id, other.parameters()))
    other.backward(images, labels, after_module=lambda k, loss: None)
    assert not gradients(net)
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert not torch.equal(other(images), before)
    assert_same(net.state_dict(), weights)
    assert torch.equal(net(images), before)


@pytest.mark.parametrize(
    ("name", "method", "dtype"),
    [("vit", "feature-reconstruction", torch.bfloat16), ("cnn", "infopro", torch.float64)],
)
def test_another_dtype(name, method, dtype):
    net, (images, labels) = split(name, method=method).to(dtype), batch()
    output = net.backward(images.to(dtype), labels)
    assert {p.grad.dtype for p in net.parameters()} == {dtype}
    assert output.losses.isfinite().all()
    assert {logits.dtype for logits in output.predictions} == {dtype}


def test_a_module_exempts_from_weight_decay_what_the_backbone_exempts():
    net = split("vit")
    assert net.local_modules[0].no_weight_decay() == net.backbone.no_weight_decay() != set()
    assert split("mlp").local_modules[0].no_weight_decay() == set()
