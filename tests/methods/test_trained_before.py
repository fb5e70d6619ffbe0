"""Methods for weights that have been trained before: lopt and distance."""

import copy

import pytest
import torch

from localprop.errors import ConfigError
from localprop.settings.config import OptimConfig
from localprop.training.optimizers import lr_scales
from localprop.training.state import TrainingState
from tiny import MODELS, assert_same, batch, gradients, split

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_lopt_is_feature_reconstruction_without_the_label(name):
    options = {"task": (0, 0)}
    own = split(name, 3, "lopt").train()
    other = split(name, 3, "feature-reconstruction", method_kwargs=options, reach=0).train()
    outputs = [net.backward(*batch(), seed=3) for net in (own, other)]
    assert torch.equal(outputs[0].losses, outputs[1].losses)
    assert_same(gradients(own), gradients(other))
    assert outputs[0].predictions[:2] == [None, None]


def test_modules_of_lopt_learn_slowly_but_the_last():
    net = split("vit", 3, "lopt", method_kwargs={"rate": 0.2})
    scales = lr_scales(net, OptimConfig(backbone_lr_scale=0.5))
    for k, module in enumerate(net.local_modules):
        for name, parameter in module.named_parameters():
            expected = 1.0 if name.startswith(("auxiliary", "head")) else 0.5 if k == 2 else 0.1
            assert scales.get(parameter, 1.0) == expected, name
    assert {0.1, 1.0} == set(lr_scales(split("vit", 3, "lopt"), OptimConfig()).values())


def without_copies(tensors):
    return {name: value for name, value in tensors.items() if ".copy." not in name}


@pytest.mark.parametrize("name", MODELS)
def test_distance_begins_as_greedy_learning(name):
    """In evaluation mode: dropout moves a module's output, and not its copy's."""
    own, other = (split(name, 3, method).eval() for method in ("distance", "greedy"))
    state = without_copies(own.state_dict())
    other.load_state_dict(state)
    outputs = [net.backward(*batch()) for net in (own, other)]
    assert torch.equal(outputs[0].losses, outputs[1].losses)
    assert_same(gradients(own), gradients(other))


@pytest.mark.parametrize("name", ["swin", "resnet", "mlp"])
def test_distance_is_from_what_the_module_was(name):
    net = split(name, 3, "distance", method_kwargs={"weight": 3.0}).train()
    before = copy.deepcopy(net).eval()
    state = TrainingState(net, OptimConfig(opt="momentum", lr=0.01, warmup_epochs=0), 10, CPU)
    copies = {key: value.clone() for key, value in net.state_dict().items() if ".copy." in key}
    assert copies
    for step in range(2):
        state.train_step(list(batch()), seed=step)
    assert_same(copies, {key: value for key, value in net.state_dict().items() if ".copy." in key})
    net.eval()
    images, labels = batch()
    losses, features, context, theirs = net.backward(images, labels).losses, images, {}, {}
    for k, module in enumerate(net.local_modules[:-1]):
        with torch.no_grad():
            output, expected = module(features, context), before.local_modules[k](features, theirs)
            distance = (output - expected).square().sum() / expected.square().sum()
            judged, _ = module.local_loss.judge(output, labels)
        assert distance > 0
        assert losses[k].item() == pytest.approx((judged + 3 * distance).item(), rel=1e-5)
        features = output


def test_a_resumed_run_keeps_the_copies():
    own, other = (split("vit", 3, "distance") for _ in range(2))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    states = [TrainingState(net.train(), OptimConfig(), 10, CPU) for net in (own, other)]
    states[0].train_step(list(batch()), seed=0)
    states[1].load(copy.deepcopy(states[0].parts()), 1)
    assert_same(own.state_dict(), other.state_dict())
    copies = [module.local_loss.copy for module in own.local_modules[:2]]
    assert not any(parameter.requires_grad for own in copies for parameter in own.parameters())
    assert not any(module.training for own in copies for module in own.modules())


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("lopt", {"rate": 0.0}, "rate is 0; it must be above 0 and at most 1"),
        ("lopt", {"rate": 2.0}, "rate is 2"),
        ("lopt", {"weight": 0.0}, "would learn nothing"),
        ("distance", {"weight": -1.0}, "weight is -1; it must be at least 0"),
        ("distance", {"task": (0, 1)}, "task is 0 in module 1 of 3, which would learn nothing"),
    ],
)
def test_impossible_options_get_a_line(method, options, words):
    with pytest.raises(ConfigError) as caught:
        split("mlp", 3, method, method_kwargs=options)
    assert words in str(caught.value)
