"""Heads that read ahead, through the next module's first blocks: one shared forward, and whose weights are trained."""

import gc
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import localprop
from localprop import localize
from localprop.errors import ConfigError
from localprop.memory.recompute import recomputing
from localprop.network.capture import CapturedBackward
from localprop.seeding import derive_seed
from tape import TapePool
from tiny import MODELS, SIZE, assert_same, batch, build, gradients, split

HEADS = ["greedy", "infopro", "feature-reconstruction"]


def two_forwards(net, images, labels, seed, parts=1):
    """The same with a second forward of the shared units, which gives the head's gradient alone. Adds to `.grad`.

    Returns:
        The losses, and the predictions of the heads.
    """
    modules, features, context = net.local_modules, images, {}
    losses, predictions = [], []

    def add(parameters, values):
        for parameter, value in zip(parameters, values, strict=True):
            if value is not None:
                parameter.grad = value if parameter.grad is None else parameter.grad + value

    def grad(roots, inputs, outputs=None):
        with torch.autocast("cpu", enabled=False):
            return torch.autograd.grad(roots, inputs, outputs, allow_unused=True)

    for k, module in enumerate(modules):
        own = [p for unit in module._units for p in unit.used(net.backbone, nn.Module.parameters)]
        following = modules[k + 1] if k + 1 < len(modules) else None
        energies = []
        with recomputing(module.recompute):
            # Its first units draw as they did for the head before, the others from the module's own stream.
            if module.shared:
                torch.manual_seed(derive_seed(seed, "ahead", k - 1))
            output = module(features, context, 0, module.shared, energies)
            torch.manual_seed(derive_seed(seed, "module", k))
            output = module(output, context, module.shared, None, energies)
            energy = sum(energies[1:], energies[0]) if energies else None
            loss = module.local_loss
            if following is None or not following.shared:
                judged, prediction = loss(output, features, images, labels)
                total = judged if energy is None else judged + energy
                trained = [*own, *loss.parameters()]
                add(trained, grad([total / parts if parts > 1 else total], trained))
            else:
                leaf = output.detach().requires_grad_()
                rest = loss.rest(leaf, features, images, labels)
                total = output.new_zeros((), dtype=torch.float32) if rest is None else rest.detach()
                from_rest = None
                if rest is not None:
                    others = [p for name, p in loss.named_parameters() if not name.startswith("head.")]
                    from_rest, *values = grad([rest / parts if parts > 1 else rest], [leaf, *others])
                    add(others, values)
                total = total if energy is None else total + energy.detach()
                torch.clear_autocast_cache()
                torch.manual_seed(derive_seed(seed, "ahead", k))
                with recomputing(following.recompute):
                    seen = following(leaf, dict(context), 0, following.shared)
                    judged, prediction = loss.judge(seen, labels)
                head = list(loss.head.parameters())
                from_head, *values = grad([judged / parts if parts > 1 else judged], [leaf, *head])
                add(head, values)
                total = total + judged.detach()
                at_output = from_head if from_rest is None else from_rest + from_head
                roots, outputs = [output], [at_output]
                if energy is not None:
                    roots, outputs = [output, energy / parts if parts > 1 else energy], [at_output, None]
                add(own, grad(roots, own, outputs))
        torch.clear_autocast_cache()
        losses.append(total.detach())
        predictions.append(None if prediction is None else prediction.detach())
        features = output.detach()
    return losses, predictions


def network(name, method, reach, split_blocks=False, **options):
    if not split_blocks:
        return split(name, method=method, reach=reach, **options)
    torch.manual_seed(1)
    return localize(build(name), 4, method, reach=reach, input_size=SIZE, split_blocks=True, **options)


CASES = [
    ("swin", "greedy", {}),
    ("swin", "infopro", {"recompute": True}),
    ("swin", "feature-reconstruction", {"kinetic": 0.1}),
    ("vit", "feature-reconstruction", {"recompute": True}),
    ("vit", "greedy", {"split_blocks": True}),
    ("vit", "infopro", {"kinetic": 0.3}),
    ("resnet", "feature-reconstruction", {}),
    ("mlp", "greedy", {}),
    ("cnn", "infopro", {}),
]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("reach", [1, 2, 9])
@pytest.mark.parametrize(("name", "method", "options"), CASES)
def test_one_shared_forward_has_the_bits_of_two(name, method, options, reach, half):
    own, other = (network(name, method, reach, **options).train() for _ in range(2))
    assert all(module.shared for module in own.local_modules[1:])
    for part in range(2):
        images, labels = batch(seed=part)
        with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
            output = own.backward(images, labels, seed=part, parts=2)
            losses, predictions = two_forwards(other, images, labels, part, parts=2)
        for a, b in zip(output.losses, losses, strict=True):
            assert torch.equal(a, b.float())
        for a, b in zip(output.predictions, predictions, strict=True):
            assert torch.equal(a, b)
    assert_same(gradients(own), gradients(other))
    assert gradients(own).keys() == {name for name, _ in own.named_parameters()}


@pytest.mark.parametrize("name", ["swin", "vit", "resnet"])
def test_reaching_to_the_end_with_the_classifiers_weights_is_end_to_end(name):
    model = build(name).eval().double()  # without dropout, whose random numbers differ
    reference = build(name).eval().double()
    net = split(name, 2, "greedy", model=model, head="linear", reach=99)
    first, last = net.local_modules
    head = first.local_loss.head
    head.norm = nn.Identity()  # the last norm is in the last block's unit, if there is one
    head.fc.load_state_dict(model.get_classifier().state_dict())
    if name == "vit":  # whose classifier reads the class token alone
        head.forward = lambda features: head.fc(features[:, 0])
    images, labels = batch()
    net.backward(images.double(), labels)
    F.cross_entropy(reference(images.double()), labels).backward()
    for module in (first, last):
        own = {name: p.grad for name, p in module.named_parameters() if not name.startswith(("auxiliary.", "before."))}
        assert own
        for name_of, gradient in own.items():
            torch.testing.assert_close(gradient, reference.get_parameter(name_of).grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_a_head_belongs_to_the_module_whose_units_it_reads(name):
    net = split(name, method="feature-reconstruction", reach=1)
    names = [
        [n for n, _ in module.named_parameters() if not n.startswith("auxiliary.decoder")]
        for module in net.local_modules
    ]
    assert not any(n.startswith("before.") for n in names[0])
    for k, own in enumerate(names[1:], 1):
        heads = [n for n in own if n.startswith("before.head.")]
        expected = net.local_modules[k - 1].local_loss.head.state_dict().keys()
        assert heads == [f"before.head.{n}" for n, _ in net.local_modules[k - 1].local_loss.head.named_parameters()]
        assert {f"before.head.{n}" for n in expected} <= net.local_modules[k].auxiliary_state().keys()
    assert not any(n.startswith("auxiliary.head") for own in names for n in own)
    everything = [id(p) for module in net.local_modules for p in module.parameters()]
    assert sorted(everything) == sorted(map(id, net.parameters()))


@pytest.mark.parametrize("name", ["swin", "vit", "cnn"])
def test_no_gradient_of_a_head_reaches_the_units_that_it_reads(name):
    net = split(name, method="greedy", reach=1)
    images, labels = batch()
    for k in range(len(net.local_modules)):
        net.zero_grad()
        seen = {}

        def after(done, loss, k=k, seen=seen):
            if done == k:
                touched = {id(p) for p in net.parameters() if p.grad is not None}
                allowed = {id(p) for j in range(k + 1) for p in net.local_modules[j].parameters()}
                head = {id(p) for p in net.local_modules[k].local_loss.parameters()}
                seen["extra"] = touched - allowed - head

        net.backward(images, labels, after_module=after)
        assert seen == {"extra": set()}


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_a_frozen_module_only_runs(frozen):
    net = split("vit", method="greedy", reach=1, kinetic=0.1).train()
    for unit in net.local_modules[frozen]._units:
        for parameter in unit.used(net.backbone, nn.Module.parameters):
            parameter.requires_grad_(False)
    images, labels = batch()
    output = net.backward(images, labels, seed=3)
    assert output.losses.isfinite().all()
    for k, module in enumerate(net.local_modules):
        own = [p for unit in module._units for p in unit.used(net.backbone, nn.Module.parameters)]
        assert all((p.grad is None) == (k == frozen) for p in own)
        if k < 2:  # the head of a frozen module is not trained
            assert all((p.grad is None) == (k == frozen) for p in module.local_loss.head.parameters())


@pytest.mark.parametrize(("name", "recompute"), [("vit", True), ("mlp", True), ("cnn", True), ("cnn", False)])
def test_nothing_of_a_batch_is_left_over(name, recompute):
    net, counts = split(name, method="greedy", reach=1, recompute=recompute).train(), []
    gc.collect()
    gc.disable()
    try:
        for seed in range(3):
            net.backward(*batch(), seed=seed)
            counts.append(sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects()))
    finally:
        gc.enable()
    assert counts[0] == counts[1] == counts[2]


def test_without_a_second_part_a_loss_is_refused():
    class Whole(localprop.LocalLoss):
        def __init__(self, spec):
            super().__init__()
            self.head = spec.build_head()

        def forward(self, output, features, inputs, targets):
            return F.cross_entropy(self.head(output), targets), None

        def predict(self, output):
            return None

    localprop.METHODS["whole-loss"] = Whole
    try:
        with pytest.raises(ConfigError, match=r"reach is 1, .* derive it from localprop.HeadLoss, or set reach to 0"):
            split("mlp", method="whole-loss", reach=1)
    finally:
        del localprop.METHODS["whole-loss"]


def test_weights_of_a_criterion_are_refused():
    class Warm(nn.Module):
        def __init__(self):
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(()))

        def forward(self, logits, labels):
            return F.cross_entropy(logits / self.temperature, labels)

    split("mlp", method="greedy", criterion=Warm())
    with pytest.raises(ConfigError, match=r"the criterion has weights, .* set reach to 0"):
        split("mlp", method="greedy", criterion=Warm(), reach=1)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("reach", 1.5, "whole number"),
        ("reach", "1", "whole number"),
        ("modules", True, "whole number"),
        ("min_depth", 0.5, "whole number"),
        ("kinetic", "0.1", "number"),
    ],
)
def test_settings_of_another_type_are_refused(name, value, kind):
    with pytest.raises(ConfigError, match=rf"^{name} is {value!r}; it must be a {kind}$"):
        localprop.Recipe.of(**{name: value})


@pytest.mark.parametrize("name", ["swin", "vit"])
@pytest.mark.parametrize("kinetic", [0.0, 0.1])
def test_a_captured_pass_is_backward(name, kinetic):
    nets = [split(name, method="feature-reconstruction", reach=1, kinetic=kinetic).train() for _ in range(2)]
    optimizers = [
        [torch.optim.AdamW(m.parameters(), lr=torch.tensor(1e-3), fused=True) for m in net.local_modules]
        for net in nets
    ]

    def after(number):
        def step(k, loss):
            optimizers[number][k].step()
            optimizers[number][k].zero_grad(set_to_none=True)

        return step

    pool = TapePool()
    captured = CapturedBackward(nets[1], pool, after(1))
    for seed in range(5):
        a = nets[0].backward(*batch(seed=seed), seed=seed, after_module=after(0))
        b = captured(*batch(seed=seed), seed=seed)
        assert torch.equal(a.losses, b.losses)
        assert all(torch.equal(x, y) for x, y in zip(a.predictions, b.predictions, strict=True))
    assert pool.captures == 7
    assert_same(dict(nets[0].named_parameters()), dict(nets[1].named_parameters()))


@pytest.mark.parametrize("method", ["greedy", "end-to-end"])
def test_one_module_has_nothing_to_reach(method):
    with pytest.raises(ConfigError, match="reach is 1, but one module has no other behind it; leave out reach"):
        localize(build("mlp"), 1, method, reach=1, input_size=SIZE)
