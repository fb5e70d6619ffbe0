"""A network and its optimizers on fake tensors, ready to train: no data, no memory, no GPU."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from localprop.errors import LocalpropError, PlanError, first_line
from localprop.memory.kernels import kernels_of
from localprop.memory.layers import Layers
from localprop.memory.measure import plain_tensors
from localprop.memory.speed import MACHINES, assumed
from localprop.memory.tracker import Tracker
from localprop.network.carry import Carry
from localprop.network.network import LocalNetwork
from localprop.settings.config import OptimConfig
from localprop.tracing.constants import KeepConstants
from localprop.tracing.copies import fake_copy
from localprop.training.optimizers import fill_tables
from localprop.training.state import TrainingState


class Neighbours:
    """The processes beside one that is simulated, where heads read ahead. What they send is there at once.

    Args:
        tracker: watches the simulation.

    Attributes:
        given: seconds so far when a gradient was given back, in each micro-batch.
        handed: seconds so far when a batch was handed on, likewise.
    """

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._sent: Tensor | None = None
        self.given: list[float] = []
        self.handed: list[float] = []

    def give_back(self, carry: Carry) -> None:
        """See `Exchange.give_back`."""
        self.given.append(self._tracker.seconds)
        self._sent, carry.gradient = carry.gradient, None

    def hand_on(self, carry: Carry) -> None:
        """See `Exchange.hand_on`."""
        self.handed.append(self._tracker.seconds)
        if carry.pending and carry.pending.output.requires_grad:
            carry.gradient = torch.empty_like(carry.features)

    def settle(self) -> None:
        """See `Exchange.settle`."""
        self._sent = None


@contextmanager
def fake_training(
    net: LocalNetwork,
    config: OptimConfig,
    batch_size: int,
    input_size: tuple[int, int, int],
    device: str,
    modules: range | None = None,
    layers: Layers | None = None,
) -> Iterator[tuple[TrainingState, Tracker, Callable[[], Carry]]]:
    """A copy of `net` on fake tensors, ready for its second step; arguments and errors as of `simulate_step`.

    Gives the state, what watches it, and a function that makes a batch as it comes to the first of the `modules`.
    `layers`, where given, follow the copy and tell the tracker which layer makes each tensor.
    """
    fill_tables(config.opt)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    device = assumed(device)
    tracker = Tracker(MACHINES[device], layers)
    # float16 needs as much memory as bfloat16, and its loss scale needs a GPU.
    config = replace(config, amp_dtype="bfloat16")
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=config.amp)
    try:
        fake = fake_copy(net, mode).train()
        assert isinstance(fake, LocalNetwork)
        fake.run_phase = _keeping_constants(fake.run_phase)  # type: ignore[method-assign]
        with mode, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # Copies for a moving average ask for the address of tensors that have none.
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            with mixed:
                arrive = _arrivals(fake, batch_size, input_size, modules)
            with Tracker():  # which answers when the state or an optimizer asks for a number
                state = TrainingState(fake, config, 10, torch.device("cpu"), modules, exchange=Neighbours(tracker))
                _prime(state)
            following = layers.following(_layer_names(fake)) if layers else nullcontext()
            with tracker, following:
                tracker.keep_buffers()
                for kind, tensors in state.tensors().items():
                    tracker.label(tensors, kind)
                if layers:
                    _name_weights(state, tracker, layers)
                with kernels_of(device), mixed:
                    yield state, tracker, arrive
    except LocalpropError:  # a setting that is wrong in itself
        raise
    except Exception as error:  # whatever a user's model, method or criterion may raise on fake tensors
        line = first_line(error)[:200]
        raise PlanError(f"memory cannot be predicted: {type(error).__name__}: {line}") from error


def _layer_names(net: LocalNetwork) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a network that compute something, under the names by which a user knows them."""
    for name, module in net.backbone.named_modules():
        yield name, module
    for local_module in net.local_modules:
        for name, module in local_module.local_loss.named_modules():
            yield f"auxiliary.{name}" if name else "loss", module


def _name_weights(state: TrainingState, tracker: Tracker, layers: Layers) -> None:
    """Names the memory of weights, and of their optimizer states, after the weights."""
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                own = plain_tensors(list(optimizer.state.get(parameter, {}).values()))
                for tensor in [parameter, *own]:
                    tracker.allocation(tensor).layer = layers.parameter(parameter)


def _keeping_constants(run_phase: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    # Of the modules only: an optimizer may keep the tables that it makes for its next, real step.
    def run(*args: Any, **kwargs: Any) -> Tensor | None:
        with KeepConstants():
            return run_phase(*args, **kwargs)

    return run


def _arrivals(
    net: LocalNetwork, batch_size: int, input_size: tuple[int, int, int], modules: range | None
) -> Callable[[], Carry]:
    """What makes a batch as it comes to the first of some modules, while all of the network is there."""
    own = range(len(net.local_modules)) if modules is None else modules
    dtype = next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)
    first, context = torch.empty(batch_size, *input_size, dtype=dtype), dict[str, Any]()
    features = first
    with torch.no_grad(), KeepConstants():
        for module in net.local_modules[: own.start]:
            features = module(features, context)
    read = {name for module in net.local_modules[own.start :] for name in module.reads}
    context = {name: value for name, value in context.items() if name in read}
    looks = any(net.local_modules[k].local_loss.uses_inputs for k in own)
    target = net.task.target(net.prediction_shape)

    def arrive() -> Carry:
        came = torch.empty_like(features)
        inputs = came if own.start == 0 else torch.empty_like(first) if looks else None
        targets = target.batch(batch_size, dtype)
        # To which the head adds its own that reads ahead.
        losses = [torch.empty(())] if net.local_modules[own.start].shared else []
        beside = tree_map_only(Tensor, torch.empty_like, context)
        return Carry(came, targets, inputs if looks else None, beside, losses)

    return arrive


def _prime(state: TrainingState) -> None:
    """Gives the optimizers the state that they have after a first step."""
    for k, optimizer in zip(state.modules, state.optimizers, strict=True):
        module = state.net.local_modules[k]
        for parameter in module.parameters():
            if parameter.requires_grad and not module.frozen:
                parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
