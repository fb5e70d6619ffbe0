"""The fastest local training within any memory: where the chain is cut, and what each unit computes again."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from localprop.memory.cost import End
from localprop.planning.search.fronts import Indices, Numbers
from localprop.planning.search.runs import Runs
from localprop.planning.search.ways import Way

_ROUNDS = 8


class Module(NamedTuple):
    """A local module.

    Attributes:
        end: what comes after the forward of its last unit.
        shared: how many of its first units the head of the module before reads.
        beside: bytes that its auxiliary nets take all the time: weights, and what the optimizer keeps of them.
    """

    end: End
    shared: int
    beside: int


class _Fronts(NamedTuple):
    """The fronts of all runs of units that may be one module of a network.

    Attributes:
        start: (runs,) first unit of each.
        stop: (runs,) unit after its last.
        beside: (runs,) as of `Module`.
        need: (runs, ways) bytes, ascending, and infinite where a front has fewer ways.
        seconds: (runs, ways) likewise.
    """

    start: Indices
    stop: Indices
    beside: Numbers
    need: Numbers
    seconds: Numbers


class LocalSearch:
    """Training in a number of local modules, each of which has a step of its own.

    Args:
        runs: of the chain's units; the input of a module's first unit needs no gradient.
        count: number of modules.
        module: the module number `index` with the units [start, stop), from (index, start, stop).
        starts: where modules may begin and end: numbers of units, from 0 to that of all.
        likewise: the first module that costs what a module costs, if it has the same units.
        allowed: whether the units [start, stop) may be a module.
        known: fronts of other numbers of modules whose modules cost the same.
    """

    def __init__(
        self,
        runs: Runs,
        count: int,
        module: Callable[[int, int, int], Module],
        starts: Sequence[int],
        likewise: Callable[[int], int],
        allowed: Callable[[int, int], bool] = lambda start, stop: True,
        known: dict[int, _Fronts] | None = None,
    ) -> None:
        self._runs, self._module, self._starts, self._allowed = runs, module, starts, allowed
        # Counted from the end where it is the last, so that the same number stands for it whatever their number.
        self._kinds = [-1 if index == count - 1 else likewise(index) for index in range(count)]
        self._fronts = {} if known is None else known
        for index, kind in enumerate(self._kinds):
            if kind not in self._fronts:
                self._fronts[kind] = self._all(index, count)

    def _all(self, index: int, count: int) -> _Fronts:
        """The fronts of all runs of units that may be this module."""
        first, last = index == 0, index == count - 1
        size = len(self._runs.units)
        pairs = [
            (start, stop)
            for start in (self._starts[:1] if first else self._starts[1:])
            for stop in (self._starts[-1:] if last else self._starts[:-1])
            if start < stop <= size and self._allowed(start, stop)
        ]
        modules = [self._module(index, *pair) for pair in pairs]
        fronts = [self._runs.front(*pair, own.end, own.shared) for pair, own in zip(pairs, modules, strict=True)]
        most = max((len(found.need) for found in fronts), default=0)
        need, seconds = np.full((2, len(pairs), most), np.inf)
        for i, found in enumerate(fronts):
            need[i, : len(found.need)] = found.need
            seconds[i, : len(found.need)] = found.seconds
        start, stop = np.array(pairs, np.int64).reshape(-1, 2).T
        return _Fronts(start, stop, np.array([own.beside for own in modules], float), need, seconds)

    def fastest(self, limit: float) -> Way | None:
        """The fastest way that needs no more than `limit` bytes, auxiliary nets included; None if there is none.

        Auxiliary nets are many where there are many modules, and which of them is not known beforehand. So it may be
        one that is not quite the fastest.
        """
        for price in (0.0, 1.0):
            beside = 0.0
            for _ in range(_ROUNDS):
                found = self._divided(limit - beside, price)
                if found is None:
                    break
                way, taken = found
                if way.need + taken <= limit:
                    return way._replace(need=way.need + taken)
                # Of modules with less memory, which may be others: they are looked for again.
                beside = max(taken, beside + limit / 256)
        return None

    def least(self) -> float:
        """The fewest bytes for which there is a way, to a hundredth."""
        fewest, enough = 0.0, 1.0
        while self.fastest(enough) is None and enough < 2**50:
            fewest, enough = enough, 2 * enough
        while enough - fewest > 0.01 * enough:
            middle = (fewest + enough) / 2
            fewest, enough = (fewest, middle) if self.fastest(middle) else (middle, enough)
        return enough

    def _divided(self, limit: float, price: float) -> tuple[Way, float] | None:
        """The fastest way in which no module needs more than `limit` bytes, and what auxiliary nets take beside.

        With a `price` of seconds for each of their bytes it is the one with the fewest.
        """
        size = self._starts[-1]
        best = np.full(size + 1, np.inf)
        best[0] = 0.0
        chosen: list[tuple[_Fronts, Indices, Indices]] = []
        for kind in self._kinds:
            fronts = self._fronts[kind]
            ways = (fronts.need <= limit).sum(1) - 1
            own = np.where(ways < 0, np.inf, fronts.seconds[np.arange(len(ways)), ways] if len(ways) else 0.0)
            total = best[fronts.start] + own + price * fronts.beside
            best, found = np.full(size + 1, np.inf), np.full(size + 1, -1)
            for run in np.argsort(-total, kind="stable"):  # the best comes last, and stays
                best[fronts.stop[run]], found[fronts.stop[run]] = total[run], run
            chosen.append((fronts, ways, found))
        if not np.isfinite(best[size]):
            return None
        return self._traced(chosen)

    def _traced(self, chosen: list[tuple[_Fronts, Indices, Indices]]) -> tuple[Way, float]:
        stop, runs = self._starts[-1], list[tuple[int, int, int]]()
        need = seconds = beside = 0.0
        for fronts, ways, found in reversed(chosen):
            run = int(found[stop])
            runs.insert(0, (int(fronts.start[run]), stop, int(ways[run])))
            need = max(need, float(fronts.need[run, ways[run]]))
            seconds += float(fronts.seconds[run, ways[run]])
            beside += float(fronts.beside[run])
            stop = int(fronts.start[run])
        names = []
        for index, (start, stop, way) in enumerate(runs):
            own = self._module(index, start, stop)
            names.append(self._runs.choices(start, stop, own.end, way, own.shared))
        return Way([stop for _, stop, _ in runs], names, need, seconds), beside
