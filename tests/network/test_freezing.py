"""Frozen modules and units: they only run, and everything else learns as it did."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from localprop import localize
from localprop.division.exactly import exactly
from localprop.errors import ChainError, ConfigError
from localprop.settings.config import OptimConfig
from localprop.training.state import TrainingState
from one_graph import one_graph
from tiny import CUTS, SIZE, assert_same, batch, build, gradients, split, traced_once, units_of

METHODS = ["feature-reconstruction", "greedy", "infopro", "end-to-end"]


def frozen_names(name, units):
    """Names of the parameters of some units."""
    return {parameter for unit in units_of(name)[:units] for parameter in unit.parameters}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_first_modules_that_are_frozen_only_run(name, method):
    net = split(name, 3, method, freeze_modules=2).train()
    before = {key: value.clone() for key, value in net.backbone.state_dict().items()}
    first = sum(len(module.units) for module in net.local_modules[:2])
    state = TrainingState(net, OptimConfig(lr=0.1, warmup_epochs=0), 10, torch.device("cpu"))
    for step in range(2):
        losses = state.train_step(list(batch()), seed=step)
    names = frozen_names(name, first)
    units = units_of(name)[:first]
    assert names
    kept = names | {buffer for unit in units for buffer in unit.buffers}
    after = net.backbone.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in kept)
    assert not any(torch.equal(after[key], before[key]) for key in before if key not in kept and "tracked" not in key)
    assert not any([*module.local_loss.parameters()] for module in net.local_modules[:2])
    assert not any(group["params"] for optimizer in state.optimizers[:2] for group in optimizer.param_groups)
    assert state.optimizers[2].state
    if method != "end-to-end":
        assert losses[:2].tolist() == [0, 0]
        assert net.module_predictions(batch()[0])[:2] == [None, None]


def by_hand(name, units):
    """The model with some first units frozen in a plain way: no gradient, batch norm in eval mode."""
    model = build(name).train()
    for unit in units_of(name)[:units]:
        for parameter in unit.parameters:
            model.get_parameter(parameter).requires_grad_(False)
        for place in unit.modules:
            for module in model.get_submodule(place).modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
    return model


UNITS = [
    ("resnet", ("conv1", "layer1"), 2),
    ("cnn", ("0", "3"), 2),
    ("vit", ("patch_embed", "blocks.[0-1]"), 3),
]


@pytest.mark.parametrize(("name", "freeze", "units"), UNITS)
def test_one_module_with_frozen_units_is_a_plain_loop(name, freeze, units):
    with traced_once(name):
        net = localize(build(name), 1, "end-to-end", input_size=SIZE, freeze=freeze).train()
    model = by_hand(name, units)
    images, labels = batch()
    for own in (lambda: net.backward(images, labels), lambda: F.cross_entropy(model(images), labels).backward()):
        torch.manual_seed(5)
        own()
    assert gradients(model)
    assert_same(gradients(net.backbone), gradients(model))
    assert_same(dict(net.backbone.named_buffers()), dict(model.named_buffers()))


@pytest.mark.parametrize(("name", "freeze", "units"), UNITS)
def test_exact_training_with_frozen_units_is_one_graph(name, freeze, units):
    own, other = (split(name, 3, "end-to-end", freeze=freeze).train() for _ in range(2))
    images, labels = batch()
    output = own.backward(images, labels, seed=5)
    loss, _ = one_graph(other, images, labels, 5)
    assert output.losses[0].item() == pytest.approx(loss.item(), rel=1e-6)
    assert_same(gradients(own), gradients(other))
    assert_same(dict(own.named_buffers()), dict(other.named_buffers()))
    trained = (key for key, parameter in by_hand(name, units).named_parameters() if parameter.requires_grad)
    assert gradients(own).keys() == {f"backbone.{key}" for key in trained}


@pytest.mark.parametrize("method", ["feature-reconstruction", "greedy"])
def test_local_modules_beside_frozen_units_learn_as_ever(method):
    """A module that is not frozen, and follows others that are as they were, has the same gradients."""
    frozen, plain = (split("mlp", 3, method, **options).train() for options in ({"freeze": ("1",)}, {}))
    for own, other in zip(frozen.local_modules[1:], plain.local_modules[1:], strict=True):
        own.auxiliary.load_state_dict(other.auxiliary.state_dict())
    images, labels = batch()
    outputs = [net.backward(images, labels, seed=1) for net in (frozen, plain)]
    assert torch.equal(outputs[0].losses[1:], outputs[1].losses[1:])
    for k in (1, 2):
        assert_same(gradients(frozen.local_modules[k]), gradients(plain.local_modules[k]))
    assert not gradients(frozen.local_modules[0])
    assert gradients(plain.local_modules[0])


@pytest.mark.parametrize(("modules", "method"), [(1, "end-to-end"), (3, "end-to-end"), (3, "greedy")])
def test_all_is_a_linear_probe(modules, method):
    cuts = {"cuts": CUTS["vit"][3]} if modules > 1 else {}
    with traced_once("vit"):
        net = localize(build("vit"), method=method, input_size=SIZE, freeze=["all"], **cuts).train()
    net.backward(*batch())
    assert gradients(net).keys() == {"backbone.head.weight", "backbone.head.bias"}


def test_a_head_reads_ahead_past_frozen_modules_only():
    net = split("vit", 3, "greedy", freeze_modules=1, reach=1)
    assert [module.gives_head for module in net.local_modules] == [False, True, False]
    assert [module.shared for module in net.local_modules] == [0, 0, 1]
    net.backward(*batch())
    assert not gradients(net.local_modules[0])
    assert gradients(net.local_modules[1])


def test_batch_norm_of_frozen_units_stays_in_eval_mode():
    net = split("resnet", 3, "greedy", freeze_modules=1)

    def modes():
        return {name: m.training for name, m in net.backbone.named_modules() if isinstance(m, nn.BatchNorm2d)}

    expected = {name: not name.startswith(("bn1", "layer1")) for name in modes()}
    assert modes() == expected  # as soon as it is built
    net.eval()
    assert not any(modes().values())
    net.train()
    assert modes() == expected
    assert copy.deepcopy(net).eval().train().backbone.bn1.training is False


def test_what_is_frozen_stays_so_in_a_finish():
    net = exactly(split("resnet", 3, "greedy", freeze_modules=1).train())
    net.backward(*batch())
    trained = (key for key, parameter in by_hand("resnet", 2).named_parameters() if parameter.requires_grad)
    assert gradients(net).keys() == {f"backbone.{key}" for key in trained}
    assert not net.train().backbone.bn1.training


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"freeze": ["block"]}, ChainError, "no unit is called 'block'; did you mean 'blocks'?"),
        ({"freeze": ["blocks.[5-9]"]}, ChainError, "no unit is called 'blocks.[5-9]'"),
        ({"freeze": ["all", "head"]}, ChainError, "nothing is left to train in the backbone"),
        ({"freeze_modules": 3}, ChainError, "nothing is left to train in the 3 modules"),
        ({"freeze_modules": -1}, ConfigError, "freeze_modules is -1; it must be at least 0"),
        ({"freeze_modules": 1.5}, ConfigError, "freeze_modules is 1.5; it must be a whole number"),
    ],
    ids=str,
)
def test_what_cannot_be_frozen_gets_a_line(options, error, words):
    with pytest.raises(error) as caught:
        split("vit", 3, "greedy", **options)
    assert words in str(caught.value)
