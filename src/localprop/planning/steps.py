"""What a simulated training step came to: its peak, what that is made of, and its times."""

from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from localprop.memory.tracker import Allocation, Tracker

PARTS = ("parameters", "optimizer", "gradients", "activations", "temporaries")


@dataclass(frozen=True)
class PredictedStep:
    """The memory and time of one training step, from the second on, when optimizers have their state.

    Where the batch is divided into micro-batches, the middle ones stand for the first too.

    Attributes:
        peak: largest number of bytes in use at any moment: weights, optimizer state and the batch included.
        parts: the peak's bytes by use: "parameters" (with buffers and moving average), "optimizer", "gradients",
            "activations" (what lives from forward into backward, with the batch) and "temporaries".
        module: index of the local module that is trained at the peak.
        flops: floating point operations, a multiply and an add counted as two.
        seconds: expected time of an eager step; of meaning only beside another on the same machine.
        timeline: (seconds, bytes in use) after each allocation or free, in order.
        module_ends: seconds at which each module is done, in each micro-batch. In exact training, in which a module
            runs twice, its first forward has an end of its own.
        module_turns: whose end each of `module_ends` is.
        module_seconds: expected time of each module.
        entry: bytes of a micro-batch as it came: images or features, labels, and what units hand along.
        ahead: seconds until all is done that the process before waits for: its head reads ahead.
        behind: seconds of what waits for the next process, into which the last head here reads ahead.
        device_seconds: expected time of kernels alone: on CUDA, that of the same step as CUDA graphs.
    """

    peak: int
    parts: dict[str, int]
    module: int
    flops: float
    seconds: float
    timeline: list[tuple[float, int]] = field(repr=False)
    module_ends: list[float] = field(repr=False)
    module_turns: list[int] = field(repr=False)
    module_seconds: list[float] = field(repr=False)
    entry: int
    ahead: float = 0.0
    behind: float = 0.0
    device_seconds: float = 0.0


class Mark(NamedTuple):
    """A place in what a tracker saw: the number of events, and seconds, FLOPs and seconds of kernels, so far."""

    event: int
    seconds: float
    flops: float
    busy: float


class OnHost(NamedTuple):
    """Optimizer states that are on the host: how many tensors, and their bytes."""

    tensors: int = 0
    size: int = 0


@dataclass(frozen=True)
class Record:
    """What was seen of a step.

    Attributes:
        tracker: all events: those of the only micro-batch, or of a middle one and of the last.
        marks: where each module was done, and in exact training where it had run for the first time, in each of these
            micro-batches.
        order: the modules that these marks of a micro-batch are of.
        modules: those that were trained.
        micro_batches: of the step.
        entry: bytes of a micro-batch as it came.
        on_host: optimizer states that are on the host until a mark, for each mark; empty where none ever is.
        given: seconds when a gradient was given back to the process before, in each of these micro-batches.
        handed: seconds when a batch was handed on to the process that gives a gradient back, likewise.
    """

    tracker: Tracker
    marks: list[Mark]
    order: list[int]
    modules: range
    micro_batches: int
    entry: int
    on_host: list[OnHost]
    given: list[float] = field(default_factory=list)
    handed: list[float] = field(default_factory=list)

    @cached_property
    def turns(self) -> list[int]:
        """For each event, the number of the mark that it leads to, or follows if it is after the last."""
        ends = [mark.event for mark in self.marks]
        return [min(bisect_right(ends, i), len(ends) - 1) for i in range(len(self.tracker.events))]

    @cached_property
    def in_use(self) -> list[int]:
        """Bytes in use on the device after each event."""
        in_use = self.tracker.in_use()
        if not self.on_host:
            return in_use
        return [used - self.on_host[turn].size for used, turn in zip(in_use, self.turns, strict=True)]

    @cached_property
    def moment(self) -> int:
        """The event after which most is in use."""
        return max(range(len(self.in_use)), key=self.in_use.__getitem__)

    @property
    def turn(self) -> int:
        """The number of the mark that the peak leads to; see `turns`."""
        return self.turns[self.moment]

    @property
    def module(self) -> int:
        """The module at work at the peak."""
        return self.order[self.turn % len(self.order)]

    @property
    def on_host_at_peak(self) -> OnHost:
        """Optimizer states that are on the host at the peak."""
        return self.on_host[self.turn] if self.on_host else OnHost()

    @property
    def firsts(self) -> int:
        """With how many first forwards of exact training a micro-batch begins."""
        return len(self.order) - len(self.modules)

    @cached_property
    def backwards(self) -> list[int]:
        """The events with which each backward began of the module that is at work at the peak, in order.

        There are three where its head reads ahead: of all else that reads its output, of the head, and of its units. In
        the first forwards of exact training they are those of the module that is the first to go backward.
        """
        events, count = self.tracker.events, len(self.order)
        begin = self.marks[self.turn - 1].event if self.turn else 0
        end = self.marks[max(self.turn, self.turn // count * count + self.firsts)].event
        return [i for i in range(begin, end) if events[i].backward and not (i > begin and events[i - 1].backward)]

    def backward_after(self, event: int) -> int | None:
        """The event with which the first of these backwards began after an event."""
        return next((begin for begin in self.backwards if begin > event), None)

    def at_peak(self) -> list[tuple[Allocation, str]]:
        """What is in use at the peak, and for what, as of `PARTS`; optimizer states on the host included."""
        uses, last = [], len(self.tracker.events)
        for allocation in self.tracker.allocations:
            stop = last if allocation.stop is None else allocation.stop
            if allocation.start <= self.moment < stop:
                # What was there before a backward and is freed after it began was kept for it.
                backward = self.backward_after(allocation.start)
                kept = backward is not None and backward <= stop and not self.tracker.events[allocation.start].backward
                uses.append((allocation, allocation.kind or ("activations" if kept else "temporaries")))
        return uses


def predicted_step(record: Record) -> PredictedStep:
    """The memory and time of a step, from what was seen of it."""
    tracker, marks, count = record.tracker, record.marks, len(record.order)
    parts = dict.fromkeys(PARTS, 0)
    for allocation, use in record.at_peak():
        parts[use] += allocation.size
    parts["optimizer"] -= record.on_host_at_peak.size
    # The middle micro-batch comes again and again before the last.
    middle, again = marks[count - 1], max(record.micro_batches - 2, 0)
    starts = [i * middle.seconds for i in range(again + 1)]
    timeline = [(event.seconds, used) for event, used in zip(tracker.events, record.in_use, strict=True)]
    ends = [middle.seconds, tracker.seconds] if record.micro_batches > 1 else [tracker.seconds]
    done = [*(mark.seconds for mark in marks[:-1]), tracker.seconds]
    spans = [end - start for start, end in pairwise([0.0, *done])]
    return PredictedStep(
        peak=record.in_use[record.moment],
        parts=parts,
        module=record.module,
        flops=tracker.flops + again * middle.flops,
        seconds=tracker.seconds + again * middle.seconds,
        timeline=[(start + time, used) for start in starts[:-1] for time, used in timeline[: middle.event]]
        + [(starts[-1] + time, used) for time, used in timeline],
        module_ends=[start + end for start in starts[:-1] for end in done[:count]] + [starts[-1] + end for end in done],
        module_turns=record.order * (len(done) // count + again),
        module_seconds=[
            sum(sum(spans[i::count]) + again * spans[i] for i, other in enumerate(record.order) if other == k)
            for k in record.modules
        ],
        entry=record.entry,
        ahead=_in_all(
            [moment - begin for moment, begin in zip(record.given, [0.0, middle.seconds], strict=False)], again
        ),
        behind=_in_all([end - moment for moment, end in zip(record.handed, ends, strict=False)], again),
        device_seconds=tracker.clock.busy + again * middle.busy,
    )


def _in_all(seconds: list[float], again: int) -> float:
    """Seconds of all micro-batches, from those of the ones that were simulated, the first of which comes again."""
    return sum(seconds) + again * (seconds[0] if seconds else 0.0)
