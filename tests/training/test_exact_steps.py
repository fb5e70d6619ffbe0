"""Steps of exact training: what the optimizers make of the gradients of one graph, and what stops them."""

import io

import pytest
import torch

from checkpoint_states import bits
from localprop.errors import NonFiniteLossError
from localprop.settings.config import OptimConfig
from localprop.training.state import TrainingState
from one_graph import one_graph
from tiny import assert_same, batch, split

CPU = torch.device("cpu")
LIVELY = {"clip_grad": 0.05, "model_ema": True, "model_ema_decay": 0.9}
CASES = [
    ("swin", {}),
    ("vit", {"micro_batches": 2, **LIVELY}),
    ("vit", {"amp": True, **LIVELY}),
    ("resnet", {"micro_batches": 3, "amp": True}),
    ("resnet", {"opt": "momentum", **LIVELY}),
]


def state_of(name="vit", modules=3, delayed=False, **settings):
    net = split(name, modules, "end-to-end", kinetic=0.1).train()
    return TrainingState(net, OptimConfig(**settings), 10, CPU, delayed=delayed)


def train(state, steps, first=0, whole=False):
    """Trains some steps; as `whole`, with one graph over all modules and the steps of the optimizers after it."""
    losses, config = [], state.config
    half = config.amp and config.amp_dtype == "bfloat16"
    for step in range(first, first + steps):
        for part in range(config.micro_batches):
            images, labels = batch(seed=10 * step + part)
            last, seed = part + 1 == config.micro_batches, 100 * step + part
            if not whole:
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    losses.append(state.train_step([images, labels], seed, last))
                continue
            if last:
                state._begin_step()
            loss, _ = one_graph(state.net, images, labels, seed, config.micro_batches, half=half)
            for i in range(3):
                state.steps.step_checked(i, loss, step + 1, last, None)
            if last:
                state.update_average()
                state.step += 1
            losses.append(loss[None])
    return losses


def content(state):
    return {
        **{f"net {name}": tensor for name, tensor in state.net.state_dict().items()},
        **({f"ema {name}": t for name, t in state.ema.state_dict().items()} if state.ema else {}),
        **{f"optimizer {i}": tensor for i, tensor in enumerate(state.tensors()["optimizer"])},
    }


@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_steps_are_those_of_one_graph_with_an_optimizer_for_each_module(name, settings, delayed):
    if delayed and settings.get("opt", "adamw") == "adamw":
        settings = {"opt": "momentum", "lr": 0.01, **settings}  # a masked AdamW rounds as it does on CUDA
    own, other = state_of(name, delayed=delayed, **settings), state_of(name, **settings)
    losses = list(zip(train(own, 3), train(other, 3, whole=True), strict=True))
    assert all(a.tolist() == pytest.approx(b.tolist(), rel=1e-6) for a, b in losses)
    if not delayed:
        assert_same(content(own), content(other))
    else:
        for a, b in zip(content(own).values(), content(other).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"micro_batches": 2, **LIVELY}, {"amp": True, "amp_dtype": "float16"}])
def test_a_step_that_goes_on_from_saved_parts_is_the_same(settings):
    whole, half = (state_of("resnet", **settings) for _ in range(2))
    train(whole, 4)
    train(half, 2)
    file = io.BytesIO()
    torch.save(half.parts(), file)
    file.seek(0)
    again = state_of("resnet", **settings)
    parts = torch.load(file)
    assert sorted(parts) == ["module-0", "module-1", "module-2"]
    again.load(parts, 2)
    train(again, 2, first=2)
    assert bits(again.parts()) == bits(whole.parts())


@pytest.mark.parametrize("delayed", [False, True])
def test_float16_has_a_scale_for_each_module_and_the_bits_of_none(delayed):
    plain, scaled = state_of("vit", delayed=delayed), state_of("vit", amp=True, amp_dtype="float16", delayed=delayed)
    for k, scaler in enumerate(scaled.scalers):
        scaler._init_scale = 2.0 ** (4 + 3 * k)
    train(plain, 3)
    train(scaled, 3)
    assert_same(content(plain), content(scaled))


@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize(("frozen", "halved"), [([], [0, 1]), ([2], [0, 1]), ([1], [0]), ([1, 2], [0])])
def test_a_gradient_that_overflows_at_a_boundary_lowers_the_scale_of_what_it_came_through(frozen, halved, delayed):
    scales = []
    for exponent in (10, 70):
        state = state_of("mlp", amp=True, amp_dtype="float16", delayed=delayed)
        backbone = state.net.backbone
        with torch.no_grad():  # gradients of weights stay small, and that of module 2's input is large
            backbone[1].weight *= 1e-20
            backbone[1].bias *= 1e-20
            backbone[4].weight *= 1e20
        for k in frozen:
            for parameter in state.net.local_modules[k].parameters():
                parameter.requires_grad_(False)
        for scaler in state.scalers:
            scaler._init_scale = 2.0**exponent
        before = {name: tensor.clone() for name, tensor in state.net.named_parameters()}
        train(state, 1)
        scales.append([state.scalers[k].get_scale() for k in range(3)])
        changed = {name for name, tensor in state.net.named_parameters() if not torch.equal(tensor, before[name])}
        skipped = {f"backbone.{name}" for k in halved for name, _ in state.net.local_modules[k].named_parameters()}
        assert changed.isdisjoint(skipped) == (exponent == 70)
    for step in range(1, 20):  # until no gradient overflows: a scale that nothing lowers would hold all steps back
        if not changed.isdisjoint(skipped):
            break
        train(state, 1, first=step)
        changed = {name for name, tensor in state.net.named_parameters() if not torch.equal(tensor, before[name])}
    assert 1 < step < 19
    assert scales == [[2.0**10] * 3, [2.0 ** (69 if k in halved else 70) for k in range(3)]]


def test_a_loss_that_is_not_finite_names_no_module_and_nothing_is_stepped():
    state = state_of()
    before = {name: tensor.clone() for name, tensor in state.net.state_dict().items()}
    images, labels = batch()
    with pytest.raises(NonFiniteLossError, match=r"^the loss is nan at step 1; nothing is saved: lower --lr"):
        state.train_step([images * float("nan"), labels], 0)
    assert_same(before, state.net.state_dict())
    assert all(parameter.grad is None for parameter in state.net.parameters())


@pytest.mark.parametrize("delayed", [False, True])
def test_a_gradient_that_is_not_finite_leaves_its_module_and_those_before_it(delayed):
    state = state_of("vit", delayed=delayed, opt="momentum", lr=0.1)
    before = {name: tensor.clone() for name, tensor in state.net.named_parameters()}
    middle = next(state.net.local_modules[1].parameters())
    middle.register_hook(lambda gradient: gradient * float("nan"))
    line = r"the gradient of .* in module 2 of 3 .* is not finite at step 1.*; weights up to this module are as before"
    if delayed:
        losses = state.train_step(list(batch()), 0)
        problem = state.problem(losses.tolist(), state.mask.flags.tolist(), 1)
        assert problem is not None
        with pytest.raises(NonFiniteLossError, match=line):
            raise problem
    else:
        with pytest.raises(NonFiniteLossError, match=line):
            state.train_step(list(batch()), 0)
    changed = {name for name, tensor in state.net.named_parameters() if not torch.equal(tensor, before[name])}
    last = {f"backbone.{name}" for name, _ in state.net.local_modules[2].named_parameters()}
    assert changed
    assert changed <= last
