"""When processes that train together compute, wait and send: recorded step by step, and put together.

Times are seconds of `time.perf_counter`, brought to one clock before they come to a `Timeline`.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

KINDS = {
    "compute": "trains a module",
    "wait": "waits for features",
    "room": "waits for room",
    "gradient": "waits for a gradient",
    "send": "sends",
    "back": "sends a gradient back",
    "load": "loads images",
    "replicas": "talks to replicas",
    "evaluate": "evaluates",
    "save": "saves",
}
"""What a process does. "replicas" lies within "compute" where gradients are averaged."""
WAITING = ("wait", "room", "gradient")
BETWEEN = ("evaluate", "save")
"""What is done between steps, not in them."""
RECORDED = 200
"""Steps that are kept, the last ones."""
_FILLING = 10
"""Steps until batches are in flight everywhere, and the one is over whose memory is measured."""


class Span(NamedTuple):
    """Something that a process did, from `begin` to `end`, in step `step` of the run (from 0)."""

    kind: str
    step: int
    module: int | None
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.begin


class Recorder:
    """Records what this process does in the last steps; memory does not grow with the run.

    Args:
        settle: called at the end of a span that is not a "send", before the clock is read, so that work which a device
            still has to do belongs to it.

    Attributes:
        spans: in the order in which they ended.
    """

    def __init__(self, settle: Callable[[], None] | None = None) -> None:
        self.spans: deque[Span] = deque()
        self._settle = settle
        self._step = 0

    def begin(self, step: int) -> None:
        """Says that what comes is of `step`."""
        self._step = step
        while self.spans and self.spans[0].step <= step - RECORDED:
            self.spans.popleft()

    @contextmanager
    def span(self, kind: str, module: int | None = None) -> Iterator[None]:
        """Records what is done inside."""
        begin = time.perf_counter()
        yield
        if self._settle and kind != "send":
            self._settle()
        self.spans.append(Span(kind, self._step, module, begin, time.perf_counter()))


@dataclass(frozen=True)
class Lane:
    """What one process did: its name, and its spans in the order in which they began."""

    name: str
    spans: Sequence[Span]

    def of(self, steps: range) -> list[Span]:
        """What it did in these steps, without evaluations and checkpoints."""
        return [span for span in self.spans if span.step in steps and span.kind not in BETWEEN]


@dataclass(frozen=True)
class Timeline:
    """What all processes did, by rank, on one clock.

    Attributes:
        lanes: one for each process.
        modules: number of local modules.
        clock_error: how far a process's times may be off, in seconds, by rank.
    """

    lanes: Sequence[Lane]
    modules: int
    clock_error: Sequence[float]

    def steady(self) -> range:
        """The longest row of steps without an evaluation or checkpoint, less the first, in which the pipeline fills."""
        computed = {span.step for lane in self.lanes for span in lane.spans if span.kind == "compute"}
        if not computed:
            return range(0)
        # Whatever is done between steps belongs to the step before it.
        cuts = {span.step + 1 for lane in self.lanes for span in lane.spans if span.kind in BETWEEN}
        starts = sorted({min(computed), *(cut for cut in cuts if cut in computed)})
        rows = [range(a, b) for a, b in zip(starts, [*starts[1:], max(computed) + 1], strict=True)]
        longest = max(rows, key=len)
        return longest[min(_FILLING, len(longest) // 2) :]

    def shares(self, steps: range) -> list[dict[str, float]]:
        """Parts of each process's time in these steps, by kind, which with "other" add up to 1; empty if it has none.

        A process's time is from its first span of the first step to its last one of the last step.
        """
        return [_shares(lane.of(steps)) for lane in self.lanes]

    def waiting(self, steps: range) -> list[float]:
        """The part of each process's time in which it waited for another one, in these steps."""
        return [sum(own.get(kind, 0.0) for kind in WAITING) for own in self.shares(steps)]

    def as_chrome(self, title: str) -> dict[str, Any]:
        """The timeline in Chrome's trace event format, which chrome://tracing and ui.perfetto.dev open."""
        zero = min((span.begin for lane in self.lanes for span in lane.spans), default=0.0)
        events: list[dict[str, Any]] = [{"name": "process_name", "ph": "M", "pid": 0, "args": {"name": title}}]
        for rank, lane in enumerate(self.lanes):
            own = {"pid": 0, "tid": rank}
            events.append({"name": "thread_name", "ph": "M", **own, "args": {"name": f"rank {rank}: {lane.name}"}})
            events.append({"name": "thread_sort_index", "ph": "M", **own, "args": {"sort_index": rank}})
            events += [_event(span, zero) | own for span in lane.spans]
        steps = self.steady()
        metadata = {
            "steady_steps": [steps.start, steps.stop],
            "ranks": [lane.name for lane in self.lanes],
            "shares": [{kind: round(part, 5) for kind, part in own.items()} for own in self.shares(steps)],
            "waiting": [round(part, 5) for part in self.waiting(steps)],
            "clock_error_us": [round(1e6 * error, 1) for error in self.clock_error],
        }
        return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": metadata}


def _event(span: Span, zero: float) -> dict[str, Any]:
    name = KINDS[span.kind] if span.module is None else f"module {span.module + 1}"
    begin, end = (round(1e6 * (moment - zero), 3) for moment in (span.begin, span.end))
    args = {"step": span.step} | ({} if span.module is None else {"module": span.module})
    return {"name": name, "cat": span.kind, "ph": "X", "ts": begin, "dur": round(end - begin, 3), "args": args}


def _shares(spans: Sequence[Span]) -> dict[str, float]:
    if not spans:
        return {}
    whole = max(span.end for span in spans) - min(span.begin for span in spans)
    sums = {kind: sum(span.seconds for span in spans if span.kind == kind) for kind in KINDS if kind not in BETWEEN}
    # Averaging is done while a module is trained, and is not computing.
    trained = [span for span in spans if span.kind == "compute"]
    inside = [span for span in spans if span.kind == "replicas" and any(_holds(own, span) for own in trained)]
    sums["compute"] -= sum(span.seconds for span in inside)
    return {**{kind: total / whole for kind, total in sums.items()}, "other": 1 - sum(sums.values()) / whole}


def _holds(outer: Span, inner: Span) -> bool:
    return outer.begin <= inner.begin and inner.end <= outer.end
