"""One training step on fake tensors: what it allocates and computes, without data, memory or a GPU."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from localprop.memory.kernels import kernels_of
from localprop.memory.layers import Layers
from localprop.memory.measure import plain_tensors, total_bytes
from localprop.memory.speed import MACHINES
from localprop.memory.tracker import Tracker
from localprop.network.carry import Carry
from localprop.network.network import LocalNetwork
from localprop.network.phase import Phase
from localprop.network.resting import Resting
from localprop.parallel.averaging import average
from localprop.planning.fake_training import Neighbours, fake_training
from localprop.planning.steps import Mark, OnHost, PredictedStep, Record, predicted_step
from localprop.settings.config import OptimConfig
from localprop.tracing.constants import KeepConstants
from localprop.tracing.copies import fake_copy
from localprop.training.state import TrainingState


def simulate_step(
    net: LocalNetwork,
    config: OptimConfig,
    batch_size: int,
    input_size: tuple[int, int, int],
    device: str = "cpu",
    modules: range | None = None,
    replicas: int = 1,
) -> PredictedStep:
    """Runs a training step of a copy of `net` on fake tensors.

    Args:
        net: the network; it is not changed, and may be on any device.
        config: optimizer, precision, moving average.
        batch_size: images per step, of this replica.
        input_size: (channels, height, width) of an image.
        device: "cpu" or "cuda": whose kernels and speed to assume.
        modules: those that the process trains, which holds no others; default: all.
        replicas: processes that average the gradients of these modules.

    Raises:
        PlanError: the network's code does something that cannot be done without values.
    """
    return predicted_step(record_step(net, config, batch_size, input_size, device, modules, replicas))


class OwnStep(NamedTuple):
    """What a training step that somebody else wrote takes.

    Attributes:
        peak: largest number of bytes in use at any moment: weights, optimizer state and the batch included.
        flops: floating point operations.
        seconds: expected time; of meaning only beside another on the same machine.
    """

    peak: int
    flops: float
    seconds: float


def simulate_own_step(
    net: nn.Module, make: Callable[[nn.Module], tuple[Callable[[], None], Iterable[Tensor]]], device: str = "cpu"
) -> OwnStep:
    """Runs a training step of one's own on fake tensors.

    Args:
        net: the network; it is not changed.
        make: gives, for a copy of the network on the CPU, a step and the tensors that live from step to step. The step
            makes its own batch. Mixed precision is `torch.autocast("cpu", ...)`, whatever the device.
        device: "cpu" or "cuda": whose kernels and speed to assume.
    """
    mode, tracker = FakeTensorMode(allow_non_fake_inputs=True), Tracker(MACHINES[device])
    fake = fake_copy(net, mode)
    with mode, torch.random.fork_rng(devices=[]):
        with Tracker():  # which answers when an optimizer asks for a number
            step, kept = make(fake)
        with tracker:
            tracker.keep_buffers()
            for tensor in plain_tensors(list(kept)):
                tracker.allocation(tensor)
            with kernels_of(device), KeepConstants():
                step()
    tracker.stop()
    return OwnStep(max(tracker.in_use()), tracker.flops, tracker.seconds)


def record_step(
    net: LocalNetwork,
    config: OptimConfig,
    batch_size: int,
    input_size: tuple[int, int, int],
    device: str = "cpu",
    modules: range | None = None,
    replicas: int = 1,
    layers: Layers | None = None,
) -> Record:
    """What is seen of the step of `simulate_step`; `layers`, where given, tell the layer that makes each tensor."""
    marks: list[Mark] = []
    parts = config.micro_batches
    training = fake_training(net, config, batch_size // parts, input_size, device, modules, layers)
    with training as (state, tracker, arrive):
        if replicas > 1:
            state.average = partial(average, count=replicas, start=lambda flat: lambda: None)
        if parts > 2:  # the middle ones find gradients of the first, and leave them to the last
            tracker.label(_gradients(state), "gradients")
        link = _Link(tracker)
        copies = _Copies(state, link) if config.offload_optimizer else None
        if config.offload_boundaries and net.exact:
            state.away = partial(_Away, link)
        with _watched(state, tracker, marks, copies):
            carry = _loaded(tracker, arrive)
            entry = total_bytes([carry.features, carry.targets, *plain_tensors(carry.context)])
            batch = _whole_batch(state, carry, parts)
            if parts > 1:
                state.train_step(carry, seed=0, last=False)
                carry = _loaded(tracker, arrive)
                batch.clear()
            state.train_step(carry, seed=0)
        marked = [phase for phase in state.phases if _is_marked(phase)]
        on_host = _on_host(state, parts, marked) if config.offload_optimizer else []
    tracker.stop()
    beside = state.exchange
    assert isinstance(beside, Neighbours)
    order = [phase.module for phase in marked]
    return Record(tracker, marks, order, state.modules, parts, entry, on_host, beside.given, beside.handed)


def _loaded(tracker: Tracker, arrive: Callable[[], Carry]) -> Carry:
    """A batch as it comes, its memory named."""
    before = len(tracker.allocations)
    carry = arrive()
    for allocation in tracker.allocations[before:]:
        allocation.layer = "the batch"
    return carry


def _is_marked(phase: Phase) -> bool:
    return phase.done or phase.kind == "first"


def _on_host(state: TrainingState, parts: int, marked: list[Phase]) -> list[OnHost]:
    """Which optimizer states are on the host until each mark of the micro-batches that are simulated.

    The state of a module is on the device only while that module is trained on the last micro-batch.
    """
    states = [plain_tensors(list(optimizer.state.values())) for optimizer in state.optimizers]
    all_states = [tensor for own in states for tensor in own]
    before = [OnHost(len(all_states), total_bytes(all_states))] * len(marked) if parts > 1 else []
    resting = [[tensor for other in states if other is not own for tensor in other] for own in states]
    done = [phase.module for phase in marked if phase.done]
    # That of the first to be done is there from the beginning.
    present = [done[0]] * (len(marked) - len(done)) + done
    last = [resting[k - state.modules.start] for k in present]
    return [*before, *(OnHost(len(tensors), total_bytes(tensors)) for tensors in last)]


def _gradients(state: TrainingState) -> list[Tensor]:
    """Gives the weights gradients, and returns these."""
    parameters = [p for group in state.optimizers for own in group.param_groups for p in own["params"]]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    return [parameter.grad for parameter in parameters if parameter.grad is not None]  # all have one


def _whole_batch(state: TrainingState, carry: Carry, parts: int) -> list[Tensor]:
    """The batch that a process holds while it trains on its parts, if it loads inputs; `carry` is one of these."""
    loaded = carry.inputs if state.modules.start else carry.features
    if parts == 1 or loaded is None:
        return []
    return [tensor.new_empty(parts * tensor.shape[0], *tensor.shape[1:]) for tensor in (loaded, carry.targets)]


@contextmanager
def _watched(state: TrainingState, tracker: Tracker, marks: list[Mark], copies: "_Copies | None") -> Iterator[None]:
    """Tells the tracker which tensors are gradients; notes in `marks` what `Record.marks` has."""

    def before(optimizer: torch.optim.Optimizer, *_: object) -> None:
        if copies:
            copies.wait()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        tracker.label([p.grad for p in parameters if p.grad is not None], "gradients")

    finish = state.finish_phase

    def marking(phase: Phase, losses: Sequence[Tensor], last: bool) -> None:
        finish(phase, losses, last)
        if copies and last and phase.done:
            copies.send(phase.module - state.modules.start)
        if _is_marked(phase):
            marks.append(Mark(len(tracker.events), tracker.seconds, tracker.flops, tracker.clock.busy))

    state.finish_phase = marking  # type: ignore[method-assign]
    handles = [optimizer.register_step_pre_hook(before) for optimizer in state.optimizers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Link:
    """The way to the host and back. Copies wait for each other."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker, self._free = tracker, 0.0

    def copied(self, size: int) -> float:
        """Begins to copy so many bytes; returns the second when that is done."""
        self._free = max(self._free, self._tracker.seconds) + size / self._tracker.machine.host_link
        return self._free

    def wait(self, until: float) -> None:
        """Lets the device wait for a copy."""
        self._tracker.clock.wait(until)


class _Away(Resting):
    """A boundary that rests on the host: see `localprop.network.resting`."""

    def __init__(self, link: _Link, boundary: Tensor) -> None:
        super().__init__(boundary)
        self._link, self._layout, self._dtype = link, (boundary.shape, boundary.stride()), boundary.dtype
        self._there = link.copied(boundary.nbytes)

    def settle(self) -> None:
        self._link.wait(self._there)

    def _returning(self) -> Tensor:
        back = torch.empty_strided(*self._layout, dtype=self._dtype)
        self._there = self._link.copied(back.nbytes)
        return back


class _Copies:
    """When optimizer states that rest on the host are on the device: see `localprop.training.stepping.offload`.

    A module's state comes in from the moment when the one before has stepped, and goes out from the moment when it has
    stepped itself. Those that the step before has left to do come first.
    """

    def __init__(self, state: TrainingState, link: _Link) -> None:
        self._link = link
        self._sizes = [total_bytes(plain_tensors(list(own.state.values()))) for own in state.optimizers]
        done = [phase.module - state.modules.start for phase in state.phases if phase.done]
        self._next = dict(pairwise(done))
        self._there = link.copied(self._sizes[done[-1]] + self._sizes[done[0]] if len(done) > 1 else 0)

    def wait(self) -> None:
        """Waits until the state of the module is there that is the next to step."""
        self._link.wait(self._there)

    def send(self, k: int) -> None:
        """Begins to send the state of a module out, and that of the next one in."""
        if k in self._next:
            self._there = self._link.copied(self._sizes[k] + self._sizes[self._next[k]])
