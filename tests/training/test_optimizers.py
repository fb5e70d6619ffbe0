"""Optimizers by name: parameter groups, low-bit states of torchao; schedules."""

import importlib
import math
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from checkpoint_states import bits
from localprop.errors import ConfigError
from localprop.memory.tracker import Tracker
from localprop.planning.simulation import simulate_step
from localprop.settings.config import OptimConfig
from localprop.tracing.copies import fake_copy
from localprop.training.checkpoints.loading import load_checkpoint
from localprop.training.checkpoints.restoring import load_optimizer
from localprop.training.checkpoints.saving import save_checkpoint
from localprop.training.optimizers import LOW_BIT, create_optimizer, create_scheduler, fill_tables
from localprop.training.state import TrainingState
from tiny import SIZE, batch, split

CPU = torch.device("cpu")
CONFIG = OptimConfig(epochs=4, lr=1e-2, sched="cosine", warmup_epochs=0)


@pytest.fixture
def torchao():
    return pytest.importorskip("torchao.optim", reason="no torchao for this torch", exc_type=ImportError)


def training(opt="adamw", name="vit", **changes):
    return TrainingState(split(name), replace(CONFIG, opt=opt, **changes), 10, CPU)


def steps(state, count):
    """Losses (K,) of so many steps on one batch, with dropout."""
    state.net.train()
    return [state.train_step(list(batch()), seed=state.step) for _ in range(count)]


def wrapped(state):
    """Parts of the state that are made of other tensors."""
    values = [v for optimizer in state.optimizers for own in optimizer.state.values() for v in own.values()]
    return [value for value in values if hasattr(value, "__tensor_flatten__")]


def stored_bytes(value):
    if hasattr(value, "__tensor_flatten__"):
        return sum(stored_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(stored_bytes, value.values())) if isinstance(value, dict) else 0


@pytest.mark.parametrize("opt", ["adamw", "adamw8bit"])
def test_no_weight_decay_on_biases_norms_and_what_the_model_exempts(opt, request):
    if opt in LOW_BIT:
        request.getfixturevalue("torchao")
    module = split("vit").local_modules[0]
    optimizer = create_optimizer(module, replace(CONFIG, opt=opt, weight_decay=0.1))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decays) == len(list(module.parameters()))
    exempt = module.no_weight_decay()
    assert "pos_embed" in exempt
    for name, parameter in module.named_parameters():
        assert decays[id(parameter)] == (0 if parameter.ndim < 2 or name in exempt else 0.1), name


@pytest.mark.parametrize(("opt", "hint"), [("adamw8bits", "'adamw8bit'"), ("adamww", "'adamw'")])
def test_an_unknown_optimizer_is_one_line_with_a_suggestion(opt, hint):
    with pytest.raises(ConfigError, match=hint) as caught:
        create_optimizer(split("mlp").local_modules[0], replace(CONFIG, opt=opt))
    assert "\n" not in str(caught.value)


def test_without_torchao_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ConfigError, match=r"pip install 'localprop\[lowbit\]'") as caught:
        training("adamw8bit", "mlp")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("opt", LOW_BIT)
def test_low_bit_optimizers_learn(torchao, opt):
    state = training(opt)
    losses = steps(state, 12)
    assert wrapped(state)
    assert all(losses[-1] < losses[0])
    assert type(state.lr) is float
    assert state.lr < CONFIG.lr  # the schedule reaches it


@pytest.mark.parametrize("opt", LOW_BIT)
def test_a_simulation_before_training_changes_nothing(torchao, opt):
    before = steps(training(opt), 4)
    # As in a new process, which simulates a step before the first real one.
    fill_tables.cache_clear()
    for name in ("subclass_8bit", "subclass_4bit"):
        for function in vars(importlib.import_module(f"torchao.optim.{name}")).values():
            getattr(function, "cache_clear", int)()
    simulate_step(split("mlp"), replace(CONFIG, opt=opt), 4, SIZE)
    for a, b in zip(before, steps(training(opt), 4), strict=True):
        assert torch.equal(a, b)


def test_eight_bits_take_the_same_path_as_thirty_two(torchao):
    def mean(losses):
        return torch.stack(losses).mean()

    plain, low = (steps(training(opt), 12) for opt in ("adamw", "adamw8bit"))
    assert torch.equal(plain[0], low[0])
    torch.testing.assert_close(mean(plain), mean(low), rtol=0.02, atol=0)


@pytest.mark.parametrize(("opt", "at_most"), [("adamw8bit", 0.27), ("adamw4bit", 0.15)])
def test_moments_take_a_quarter_or_an_eighth(torchao, opt, at_most):
    optimizers = []
    for name in ("adamw", opt):
        torch.manual_seed(0)
        layer = torch.nn.Linear(256, 256)
        optimizers.append(create_optimizer(layer, replace(CONFIG, opt=name)))
        layer(torch.ones(1, 256)).sum().backward()
        optimizers[-1].step()
    plain, low = (sum(map(stored_bytes, optimizer.state.values())) for optimizer in optimizers)
    assert plain == 8 * 257 * 256 + 8
    assert low < at_most * plain


@pytest.mark.parametrize("opt", ["adamw8bit", "adamw4bit"])
def test_resumed_low_bit_training_is_the_same_bit_for_bit(torchao, opt, tmp_path):
    state = training(opt)
    steps(state, 3)
    path = save_checkpoint(tmp_path, state.step, state.parts(), {}, keep=1)
    other = training(opt)
    other.load(load_checkpoint(path).parts, 3)
    for a, b in zip(wrapped(state), wrapped(other), strict=True):
        assert type(a) is type(b)
        assert a.shape == b.shape
        (names, context), (_, again) = a.__tensor_flatten__(), b.__tensor_flatten__()
        assert context == again
        assert all(bits(getattr(a, name)) == bits(getattr(b, name)) for name in names)
    assert bits(steps(state, 3)) == bits(steps(other, 3))
    ends = [save_checkpoint(tmp_path, 6 + i, s.parts(), {}, keep=9) for i, s in enumerate((state, other))]
    assert (ends[0] / "module-1.safetensors").read_bytes() == (ends[1] / "module-1.safetensors").read_bytes()
    assert bits(state.net.state_dict()) == bits(other.net.state_dict())


@pytest.mark.parametrize("opt", ["adamw", "adamw8bit"])
def test_a_state_is_built_and_stepped_on_fake_tensors(opt, request):
    if opt in LOW_BIT:
        request.getfixturevalue("torchao")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    net = fake_copy(split("vit"), mode).train()
    with mode, Tracker():  # which answers when the state asks whether a buffer is finite
        state = TrainingState(net, replace(CONFIG, opt=opt), 10, CPU)
        for module, optimizer in zip(net.local_modules, state.optimizers, strict=True):
            for parameter in module.parameters():
                parameter.grad = torch.empty_like(parameter)
            optimizer.step()
    assert bool(wrapped(state)) == (opt in LOW_BIT)


@pytest.mark.parametrize(("epochs", "warmup", "steps"), [(1, None, 2), (60, None, 60), (4, 0.5, 10), (4, 0, 0)])
def test_warm_up_may_take_a_part_of_an_epoch(epochs, warmup, steps):
    model = nn.Linear(2, 2)
    config = OptimConfig(epochs=epochs, lr=1e-2, warmup_epochs=warmup)
    optimizer = create_optimizer(model, config)
    scheduler = create_scheduler(optimizer, config, steps_per_epoch=20)
    rates = []
    for step in range(20 * epochs):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    # Linear from 1e-5 up to the cosine, which goes on as if it had begun with the first step, down to the last.
    assert rates[:steps] == pytest.approx([1e-5 + (1e-2 - 1e-5) * step / steps for step in range(steps)])
    cosine = [1e-6 + (1e-2 - 1e-6) * (1 + math.cos(math.pi * s / (20 * epochs))) / 2 for s in range(20 * epochs)]
    assert rates[steps:] == pytest.approx(cosine[steps:])


def test_what_the_device_chose_is_not_taken_over_from_a_checkpoint():
    """One that CUDA wrote has capturable optimizers, which a CPU has not."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(3))
    saved, own = (torch.optim.AdamW([parameter], lr=0.1, fused=True) for _ in range(2))
    parameter.grad = torch.randn(3)
    saved.step()
    state = saved.state_dict()
    state["param_groups"][0]["capturable"] = True
    load_optimizer(own, state)
    assert own.param_groups[0]["capturable"] is False
    assert torch.equal(own.state[parameter]["exp_avg"], saved.state[parameter]["exp_avg"])
