"""One training step on fake tensors: what it allocates and computes, without data, memory or a GPU."""

import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from localprop.errors import LocalpropError, PlanError, first_line
from localprop.memory.attention import kernels_of
from localprop.memory.measure import plain_tensors, total_bytes
from localprop.memory.tracker import MACHINES, Tracker
from localprop.network.carry import Carry
from localprop.network.network import LocalNetwork
from localprop.parallel.averaging import average
from localprop.settings.config import OptimConfig
from localprop.tracing.constants import KeepConstants
from localprop.tracing.copies import fake_copy
from localprop.training.optimizers import fill_tables
from localprop.training.state import TrainingState

PARTS = ("parameters", "optimizer", "gradients", "activations", "temporaries")


@dataclass(frozen=True)
class StepTrace:
    """What one training step takes, from the second step on, when optimizers have their state.

    Where the batch is divided into micro-batches, the middle ones stand for the first too.

    Attributes:
        peak: largest number of bytes in use at any moment: weights, optimizer state and the batch included.
        parts: the peak's bytes by use: "parameters" (with buffers and moving average), "optimizer", "gradients",
            "activations" (what lives from forward into backward, with the batch) and "temporaries".
        module: index of the local module that is trained at the peak.
        flops: floating point operations, a multiply and an add counted as two.
        seconds: expected time; of meaning only beside another on the same machine.
        timeline: (seconds, bytes in use) after each allocation or free, in order.
        module_ends: seconds at which each module is done, in each micro-batch.
        module_seconds: expected time of each module.
        entry: bytes of a micro-batch as it came: images or features, labels, and what units hand along.
    """

    peak: int
    parts: dict[str, int]
    module: int
    flops: float
    seconds: float
    timeline: list[tuple[float, int]] = field(repr=False)
    module_ends: list[float] = field(repr=False)
    module_seconds: list[float] = field(repr=False)
    entry: int


class _Mark(NamedTuple):
    """A place in what a tracker saw: the number of events, and seconds and FLOPs, so far."""

    event: int
    seconds: float
    flops: float


def simulate_step(
    net: LocalNetwork,
    config: OptimConfig,
    batch_size: int,
    input_size: tuple[int, int, int],
    device: str = "cpu",
    modules: range | None = None,
    replicas: int = 1,
) -> StepTrace:
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
    marks: list[_Mark] = []
    parts = config.micro_batches
    with fake_training(net, config, batch_size // parts, input_size, device, modules) as (state, tracker, arrive):
        if replicas > 1:
            state.average = partial(average, count=replicas, start=lambda flat: lambda: None)
        if parts > 2:  # the middle ones find gradients of the first, and leave them to the last
            tracker.label(_gradients(state), "gradients")
        with _watched(state, tracker, marks):
            carry = arrive()
            entry = total_bytes([carry.features, carry.labels, *plain_tensors(carry.context)])
            held = _whole_batch(state, carry, parts)
            if parts > 1:
                state.train_step(carry, seed=0, last=False)
                carry = arrive()
                held.clear()
            state.train_step(carry, seed=0)
        states = [total_bytes(plain_tensors(list(optimizer.state.values()))) for optimizer in state.optimizers]
    # Offloaded, the state of each module is there only while that module is trained on the last micro-batch.
    before = [sum(states)] * len(states) if parts > 1 else []
    away = [*before, *(sum(states) - own for own in states)] if config.offload_optimizer else None
    return _summary(tracker, marks, away, state.modules, parts, entry)


@contextmanager
def fake_training(
    net: LocalNetwork,
    config: OptimConfig,
    batch_size: int,
    input_size: tuple[int, int, int],
    device: str,
    modules: range | None = None,
) -> Iterator[tuple[TrainingState, Tracker, Callable[[], Carry]]]:
    """A copy of `net` on fake tensors, ready for its second step; arguments and errors as of `simulate_step`.

    Gives the state, what watches it, and a function that makes a batch as it comes to the first of the `modules`.
    """
    fill_tables(config.opt)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    device = device if device in MACHINES else "cpu"
    tracker = Tracker(MACHINES[device])
    # float16 takes what bfloat16 does, and its loss scale needs a GPU.
    config = replace(config, amp_dtype="bfloat16")
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=config.amp)
    try:
        fake = fake_copy(net, mode).train()
        assert isinstance(fake, LocalNetwork)
        fake.train_module = _keeping_constants(fake.train_module)  # type: ignore[method-assign]
        with mode, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # Copies for a moving average ask for the address of tensors that have none.
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            with mixed:
                arrive = _arrivals(fake, batch_size, input_size, modules)
            with Tracker():  # which answers when the state or an optimizer asks for a number
                state = TrainingState(fake, config, 10, torch.device("cpu"), modules)
                _prime(state)
            with tracker:
                for kind, tensors in state.tensors().items():
                    tracker.label(tensors, kind)
                with kernels_of(device), mixed:
                    yield state, tracker, arrive
    except LocalpropError:  # a setting that is wrong in itself
        raise
    except Exception as error:  # whatever a user's model, method or criterion may raise on fake tensors
        line = first_line(error)[:200]
        raise PlanError(f"memory cannot be predicted: {type(error).__name__}: {line}") from error


def _keeping_constants(train_module: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    # Of the modules only: an optimizer may keep the tables that it makes for its next, real step.
    def run(*args: Any, **kwargs: Any) -> Tensor | None:
        with KeepConstants():
            return train_module(*args, **kwargs)

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
    wanted = {name for module in net.local_modules[own.start :] for name in module.reads}
    context = {name: value for name, value in context.items() if name in wanted}
    looks = any(net.local_modules[k].auxiliary.uses_images for k in own)

    def arrive() -> Carry:
        came = torch.empty_like(features)
        images = came if own.start == 0 else torch.empty_like(first) if looks else None
        labels = torch.zeros(batch_size, dtype=torch.long)
        return Carry(came, labels, images if looks else None, tree_map_only(Tensor, torch.empty_like, context))

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


def _gradients(state: TrainingState) -> list[Tensor]:
    """Gives the weights gradients, and returns these."""
    parameters = [p for group in state.optimizers for own in group.param_groups for p in own["params"]]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    return [parameter.grad for parameter in parameters if parameter.grad is not None]  # all have one


def _whole_batch(state: TrainingState, carry: Carry, parts: int) -> list[Tensor]:
    """The batch that a process holds while it trains on its parts, if it loads images; `carry` is one of these."""
    loaded = carry.images if state.modules.start else carry.features
    if parts == 1 or loaded is None:
        return []
    return [tensor.new_empty(parts * tensor.shape[0], *tensor.shape[1:]) for tensor in (loaded, carry.labels)]


@contextmanager
def _watched(state: TrainingState, tracker: Tracker, marks: list[_Mark]) -> Iterator[None]:
    """Tells the tracker which tensors are gradients; notes in `marks` where each module is done."""

    def before(optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        tracker.label([p.grad for p in parameters if p.grad is not None], "gradients")

    @contextmanager
    def doing(*_: object) -> Iterator[None]:
        yield
        marks.append(_Mark(len(tracker.events), tracker.seconds, tracker.flops))

    state.doing = doing
    handles = [optimizer.register_step_pre_hook(before) for optimizer in state.optimizers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _summary(
    tracker: Tracker, marks: list[_Mark], away: list[int] | None, modules: range, parts: int, entry: int
) -> StepTrace:
    """What a step took.

    Args:
        tracker: what it saw: the only micro-batch, or a middle one and the last.
        marks: where each module was done, in each of them.
        away: bytes that are on the host instead while each module is trained, in each of them.
        modules: those that were trained.
        parts: micro-batches of the step.
        entry: bytes of one as it came.
    """
    in_use, events, count = tracker.in_use(), tracker.events, len(modules)
    ends = [mark.event for mark in marks]
    turns = [min(bisect_right(ends, i), len(ends) - 1) for i in range(len(events))]
    if away:
        in_use = [used - away[turn] for used, turn in zip(in_use, turns, strict=True)]
    moment = max(range(len(in_use)), key=in_use.__getitem__)
    turn = turns[moment]
    uses = _uses(tracker, moment, ends[turn - 1] if turn else 0)
    uses["optimizer"] -= away[turn] if away else 0
    # The middle micro-batch comes again and again before the last.
    middle, again = marks[count - 1], max(parts - 2, 0)
    starts = [i * middle.seconds for i in range(again + 1)]
    timeline = [(event.seconds, used) for event, used in zip(events, in_use, strict=True)]
    done = [*(mark.seconds for mark in marks[:-1]), tracker.seconds]
    spans = [end - start for start, end in pairwise([0.0, *done])]
    return StepTrace(
        peak=in_use[moment],
        parts=uses,
        module=modules[turn % count],
        flops=tracker.flops + again * middle.flops,
        seconds=tracker.seconds + again * middle.seconds,
        timeline=[(start + time, used) for start in starts[:-1] for time, used in timeline[: middle.event]]
        + [(starts[-1] + time, used) for time, used in timeline],
        module_ends=[start + end for start in starts[:-1] for end in done[:count]] + [starts[-1] + end for end in done],
        module_seconds=[sum(spans[k::count]) + again * spans[k] for k in range(count)],
        entry=entry,
    )


def _uses(tracker: Tracker, moment: int, begin: int) -> dict[str, int]:
    """The bytes in use at an event, by `PARTS`; `begin` is the event at which the module's turn began."""
    events = tracker.events
    # When its backward began: what was there before and is freed after was kept for it.
    backward = next((i for i in range(begin, len(events)) if events[i].backward), len(events))
    uses = dict.fromkeys(PARTS, 0)
    for allocation in tracker.allocations:
        stop = len(events) if allocation.stop is None else allocation.stop
        if allocation.start <= moment < stop:
            kept = allocation.start < backward <= stop
            uses[allocation.kind or ("activations" if kept else "temporaries")] += allocation.size
    return uses
