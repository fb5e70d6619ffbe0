"""Exact training: the bits of one graph, whatever the number of modules."""

import copy
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import backbones
from localprop import localize
from localprop.division import divide
from localprop.errors import ConfigError
from localprop.memory.tracker import Tracker
from localprop.network.carry import Carry
from localprop.tracing.constants import KeepConstants
from localprop.tracing.copies import fake_copy
from one_graph import one_graph
from tiny import CLASSES, SIZE, assert_same, batch, build, gradients, split


def network(name, **options):
    return split(name, options.pop("modules", 3), "end-to-end", **options).train()


CASES = [
    ("swin", {}),
    ("swin", {"recompute": True, "kinetic": 0.1}),
    ("vit", {"grad_checkpointing": True}),
    ("vit", {"kinetic": 0.3, "modules": 2}),
    ("vit", {"recompute": True, "grad_checkpointing": True, "kinetic": 0.1}),
    ("vit", {"recompute_units": {"blocks.1": "whole/2", "blocks.3": "whole/4"}}),
    ("resnet", {}),
    ("resnet", {"grad_checkpointing": True}),
    ("cnn", {"kinetic": 0.1}),
    ("mlp", {"recompute": True}),
]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_it_has_the_bits_of_one_graph(name, options, again, half):
    own = network(name, **options)
    other = network(name, **{**options, "recompute": None, "grad_checkpointing": False})
    for part in range(2):
        images, labels = batch(seed=part)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            output = own.backward(images, labels, seed=part, parts=2)
        loss, prediction = one_graph(other, images, labels, part, 2, again, half)
        assert output.losses.tolist() == pytest.approx([loss.item()], rel=1e-6)
        assert torch.equal(output.prediction, prediction)
    assert_same(gradients(own), gradients(other))
    if not (again or "grad_checkpointing" in options):  # a checkpoint takes in batch norm's statistics twice
        assert_same(dict(own.named_buffers()), dict(other.named_buffers()))
    assert all(parameter.grad is not None for parameter in own.backbone.parameters())


def test_one_module_is_the_baseline_and_has_no_phases_of_its_own():
    net = localize(build("vit"), method="end-to-end", input_size=SIZE)
    assert not net.exact
    assert [phase.kind for phase in net.phases] == ["whole"]


@pytest.mark.parametrize("name", ["swin", "vit", "mlp", "cnn"])
def test_without_seeds_to_share_it_has_the_gradients_of_the_model(name):
    plain = build(name).train()
    net = localize(copy.deepcopy(plain), method="end-to-end", cuts=network(name).recipe.cuts, input_size=SIZE)
    for model in (plain, net.train()):
        for module in model.modules():  # no dropout
            if isinstance(module, (nn.Dropout, nn.Dropout2d)) or type(module).__name__ == "DropPath":
                module.eval()
    images, labels = batch()
    net.backward(images, labels)
    nn.functional.cross_entropy(plain(images), labels).backward()
    assert_same(gradients(net.backbone), gradients(plain))
    assert_same(dict(net.backbone.named_buffers()), dict(plain.named_buffers()))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "name", ["maxvit_nano_rw_256", "beit_base_patch16_224", "vit_small_patch16_dinov3", "resnet18"]
)
def test_models_that_round_differently_without_gradients(name, half):
    model, units = backbones.cut(name)
    cuts = [units[len(units) // 3].name, units[2 * len(units) // 3].name]
    results = []
    for again in (False, True):
        with mock.patch.object(divide, "chain", return_value=units):
            net = localize(copy.deepcopy(model), method="end-to-end", cuts=cuts, input_size=backbones.IMAGE).train()
        torch.manual_seed(0)
        images, labels = torch.randn(4, *backbones.IMAGE), torch.arange(4)
        if again:
            one_graph(net, images, labels, 3, half=half)
        else:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                net.backward(images, labels, seed=3)
        results.append(gradients(net) | dict(net.named_buffers()))
    assert_same(*results)


@pytest.mark.parametrize("kinetic", [0.0, 0.1])
@pytest.mark.parametrize("frozen", [[0], [1], [2], [0, 1], [1, 2], [0, 1, 2]])
def test_frozen_modules_pass_the_gradient_through_or_only_run(frozen, kinetic):
    own, other = (network("cnn", kinetic=kinetic) for _ in range(2))
    for net in (own, other):
        for k in frozen:
            for parameter in net.local_modules[k].parameters():
                parameter.requires_grad_(False)
    images, labels = batch()
    ran = []
    for k, module in enumerate(own.local_modules):
        module.register_forward_pre_hook(lambda module, args, k=k: ran.append(k))
    output = own.backward(images, labels, seed=5)
    if frozen == [0, 1, 2]:
        loss = output.losses[0]
        assert not gradients(own)
    else:
        loss, _ = one_graph(other, images, labels, 5)
        assert gradients(own)
    assert output.losses[0].item() == pytest.approx(loss.item(), rel=1e-6)
    assert_same(gradients(own), gradients(other))
    if frozen != [0, 1, 2]:
        assert_same(dict(own.named_buffers()), dict(other.named_buffers()))
    before = next((k for k in range(3) if k not in frozen), 2)
    assert sorted(ran) == sorted([*range(before), *range(before, 2), 2])


def test_a_module_is_done_before_the_one_before_it_runs_again():
    net = network("vit")
    optimizers = [torch.optim.SGD(module.parameters(), 0.1) for module in net.local_modules]
    plain = network("vit")
    images, labels = batch()
    done = []

    def step(k, loss):
        others = [p for j, module in enumerate(net.local_modules) if j != k for p in module.parameters()]
        assert all(parameter.grad is None for parameter in others)
        done.append((k, loss.item()))
        optimizers[k].step()
        optimizers[k].zero_grad()

    output = net.backward(images, labels, seed=1, after_module=step)
    assert done == [(k, output.losses.item()) for k in (2, 1, 0)]
    one_graph(plain, images, labels, 1)
    torch.optim.SGD(plain.parameters(), 0.1).step()
    assert_same(dict(net.named_parameters()), dict(plain.named_parameters()))


def test_it_has_one_loss_and_one_prediction():
    net = network("swin")
    output = net.backward(*batch(), seed=1)
    assert output.losses.shape == (1,)
    assert [tuple(p.shape) for p in output.predictions] == [tuple(output.prediction.shape)]
    assert [tuple(p.shape) for p in net.eval().module_predictions(batch()[0])] == [tuple(output.prediction.shape)]
    assert not any(True for module in net.local_modules for _ in module.local_loss.parameters())


def test_without_a_seed_both_forwards_draw_the_same_numbers():
    own, other = network("vit"), network("vit")
    torch.manual_seed(7)
    own.backward(*batch())
    later = torch.rand(3)
    torch.manual_seed(7)
    with own.seed_of_batch(None) as seed:
        one_graph(other, *batch(), seed)
    assert_same(gradients(own), gradients(other))
    torch.manual_seed(7)
    torch.randint(2**62, ())
    assert torch.equal(torch.rand(3), later)  # the generator goes on from its draw, not from what was seeded


@pytest.mark.parametrize("kinetic", [0.0, 0.1])
def test_after_the_first_forward_only_the_boundary_is_there(kinetic):
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = fake_copy(network("swin", kinetic=kinetic, grad_checkpointing=True), mode)
    with mode, KeepConstants(), Tracker() as tracker, torch.autocast("cpu", torch.bfloat16):
        carry = Carry.of([torch.empty(4, *SIZE), torch.zeros(4, dtype=torch.int64)])
        for phase in fake.phases[:2]:
            before = tracker.used
            fake.run_phase(phase, carry)
            assert tracker.used - before == carry.features.untyped_storage().nbytes()


def test_a_batch_norm_of_several_modules_takes_in_batches_in_the_order_of_a_forward():
    norm = nn.BatchNorm2d(4, affine=False)
    layers = [nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 4, 3), norm]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 26 * 26, CLASSES))
    own, other = (
        localize(copy.deepcopy(model), method="end-to-end", cuts=["0", "3"], input_size=SIZE).train() for _ in range(2)
    )
    for part in range(2):
        images, labels = batch(seed=part)
        own.backward(images, labels, seed=part, parts=2)
        one_graph(other, images, labels, part, 2)
    assert_same(gradients(own), gradients(other))
    assert_same(dict(own.named_buffers()), dict(other.named_buffers()))
    assert own.backbone[1].num_batches_tracked == 6


def test_a_gradient_of_the_images_is_that_of_one_graph():
    own, other = network("vit"), network("vit")
    images, labels = batch()
    first, second = images.clone().requires_grad_(), images.clone().requires_grad_()
    own.backward(first, labels, seed=1)
    one_graph(other, second, labels, 1)
    assert torch.equal(first.grad, second.grad)


def test_what_is_not_exact_is_refused_in_a_line():
    with pytest.raises(ConfigError, match="reach is 1, but method end-to-end has no heads"):
        network("vit", reach=1)
    net = network("vit")
    with pytest.raises(ConfigError, match="in exact training a module's gradient comes from the next one"):
        net.train_module(0, Carry(*batch()))
