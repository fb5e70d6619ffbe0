"""The fastest exact training within any memory: where the chain is cut, and what each unit computes again."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from localprop.memory.cost import End
from localprop.planning.search.fronts import Front, both, front
from localprop.planning.search.runs import Runs
from localprop.planning.search.ways import Way


class ExactSearch:
    """Exact training in modules: forward keeps their inputs; then, from the last one up, forward again and backward.

    Args:
        runs: of the chain's units; the input of every unit but the first needs a gradient.
        forward: seconds of each unit's forward.
        end: what comes after the forward of a module that ends after so many units.
        ends: after how many units each module ends; None where that is open.
        own: of each unit, bytes that are in use only while its module is trained.
        more: seconds that each further module has to bring.
        idle: number of first units that are not trained: a module of these alone runs once.
        away: whether a module's input rests on the host while later modules are trained.

    Attributes:
        front: what all modules need at their peak, beside the batch, against time.
    """

    def __init__(
        self,
        runs: Runs,
        forward: Sequence[float],
        end: Callable[[int], End],
        ends: Sequence[int] | None = None,
        own: Sequence[float] | None = None,
        more: float = 0.0,
        idle: int = 0,
        away: bool = False,
    ) -> None:
        self._idle, self._away = idle, away
        self.units, self._runs, self._end, self._more = runs.units, runs, end, more
        count = len(self.units)
        self._forward, self._own = (
            np.concatenate(([0.0], np.cumsum(each))) for each in (forward, own or [0.0] * count)
        )
        self._ends, self._fixed = list(ends or range(1, count + 1)), ends is not None
        self._fronts: dict[int, Front] = {}
        # Of each front, for each way: the way in which its first module is trained.
        self._ways: dict[int, np.ndarray] = {}
        for start in reversed([0, *self._ends[:-1]]):
            self._fronts[start], self._ways[start] = self._suffix(start)
        self.front = self._fronts[0]

    def _suffix(self, start: int) -> tuple[Front, np.ndarray]:
        """The front of the units from `start` on, beside the inputs of modules up to there that are on the device."""
        parts = []
        taken = self.units.output(start - 1) if self._away and start else 0
        later = [end for end in self._ends if end > start]
        for stop in later[:1] if self._fixed else later:
            own = self._runs.front(start, stop, self._end(stop))
            own = own._replace(need=own.need + (self._own[stop] - self._own[start]) + taken)
            if stop == len(self.units):
                need, seconds, way = own.need, own.seconds, np.arange(len(own.need))
                after = np.zeros(len(need), np.int64)
            else:
                kept = 0 if self._away else self.units.output(stop - 1)
                need, seconds, way, after = both(own, self._fronts[stop], kept)
                again = self._forward[stop] - self._forward[start] if stop > self._idle else 0.0
                seconds = seconds + again + self._more
            parts.append((need, seconds, np.full(len(need), stop), after, way))
        need, seconds, choice, after, way = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        # A front has one number for each way beside `choice`: that of a pair of ways.
        best = front(need, seconds, choice, np.arange(len(need)), self._runs.most)
        return Front(best.need, best.seconds, best.choice, after[best.after]), way[best.after]

    def way(self, number: int) -> Way:
        """A way of `front`."""
        start, ends, ways = 0, [], []
        seconds, need = float(self.front.seconds[number]), float(self.front.need[number])
        while start < len(self.units):
            stop = int(self._fronts[start].choice[number])
            ends.append(stop)
            ways.append(int(self._ways[start][number]))
            start, number = stop, int(self._fronts[start].after[number])
        names = [
            self._runs.choices(start, stop, self._end(stop), way)
            for (start, stop), way in zip(pairwise([0, *ends]), ways, strict=True)
        ]
        return Way(ends, names, need, seconds)
