"""Memory and time of steps that are built one after another and timed in turns."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from measuring import peak_of

from gpu_stages.running import Run
from gpu_stages.steps import Step

_ALONE = 4  # steps whose memory and time are taken when a step has been built


@dataclass
class Lane:
    """A step that has been built and measured, and waits to be timed in turns with others.

    Attributes:
        name: of its row.
        step: the step.
        owned: bytes that it holds between its steps.
        times: milliseconds of its steps in turns.
    """

    name: str
    step: Step
    owned: int
    times: list[float] = field(default_factory=list)


class Lanes:
    """Steps that are measured alone, and then timed in turns, so that a change of the GPU's clock affects all alike.

    Memory is a step's own: what other steps hold meanwhile is subtracted. They rest, so that is a constant.

    Args:
        run: the stage's.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.kept: list[Lane] = []
        self._largest = 0
        if run.cuda:  # cuBLAS's workspace counts in every step's memory, whichever step comes first
            square = torch.ones(256, 256, device=run.device, requires_grad=True)
            (square @ square).sum().backward()

    def add(self, name: str, build: Callable[[], Step], **known: Any) -> None:
        """Builds a step, measures it, sends its row, and keeps it for `in_turns` while memory allows."""
        self._clean()
        self.run.attempt(name, lambda: self._measured(name, build), **known)
        self._clean()

    def in_turns(self, rounds: int) -> None:
        """Times the steps that have not been timed so, in turns with the first, and sends the medians."""
        lanes = [lane for lane in self.kept if lane is self.kept[0] or not lane.times]
        for number in range(rounds + 1):
            if self.run.left < 0:
                break
            for lane in lanes:
                took = self._time(lane.step)
                if number:  # the first round warms up
                    lane.times.append(took)
        for lane in lanes:
            if lane.times:
                times = [round(took, 3) for took in lane.times]
                self.run.send(lane.name, {"ms": round(statistics.median(times), 3), "ms_in_turns": times})

    def _measured(self, name: str, build: Callable[[], Step]) -> dict[str, Any]:
        cuda, others = self.run.cuda, sum(lane.owned for lane in self.kept)
        before = (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) if cuda else (0, 0)
        step = build()
        started = time.perf_counter()
        step()  # optimizer states; of a compiled step, the compiler
        if not cuda:
            self.kept.append(Lane(name, step, 0))
            return {"allocated": peak_of(step, [], "cpu"), "reserved": None, "ms_alone": round(self._time(step), 3)}
        torch.cuda.synchronize()
        first = time.perf_counter() - started
        self._clean()  # what the first step has cached is no part of what later ones reserve
        torch.cuda.reset_peak_memory_stats()
        step()  # of graphs, the capture: only then the allocator sees what a replay uses
        times = [self._time(step) for _ in range(_ALONE)]
        values = {
            "allocated": torch.cuda.max_memory_allocated() - others,
            "reserved": torch.cuda.max_memory_reserved() - before[1],
            "ms_alone": round(statistics.median(times), 3),
            "first_step_s": round(first, 2),
        }
        self._largest = max(self._largest, values["allocated"])
        free, _ = torch.cuda.mem_get_info()
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        if free + cached > 2 * self._largest:
            self.kept.append(Lane(name, step, torch.cuda.memory_allocated() - before[0]))
        else:
            values["note"] = "timed alone: not enough memory to keep it with others"
        return values

    def _time(self, step: Step) -> float:
        """Milliseconds of a step, from start to end on the device."""
        if self.run.cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        if self.run.cuda:
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - started)

    def _clean(self) -> None:
        gc.collect()
        if self.run.cuda:
            torch.cuda.empty_cache()
