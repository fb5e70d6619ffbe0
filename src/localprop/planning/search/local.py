"""The fastest local training within any memory: where the chain is cut, and what each unit computes again."""

from collections.abc import Callable, Sequence
from copy import copy
from typing import NamedTuple

import numpy as np

from localprop.memory.cost import End
from localprop.planning.search.fronts import Indices, Numbers
from localprop.planning.search.runs import Runs
from localprop.planning.search.ways import States, Way

_ROUNDS = 8


class Module(NamedTuple):
    """A local module.

    Attributes:
        end: what comes after the forward of its last unit.
        shared: how many of its first units the head of the module before reads.
        beside: bytes of its auxiliary nets' weights.
        weights: bytes of its units' weights, as far as they are trained.
    """

    end: End
    shared: int
    beside: int
    weights: int = 0


class Fronts(NamedTuple):
    """The fronts of all runs of units that may be one module of a network.

    Attributes:
        start: (runs,) first unit of each.
        stop: (runs,) unit after its last.
        beside: (runs,) bytes that auxiliary nets take all the time.
        weights: (runs,) bytes of all weights that are trained.
        need: (runs, ways) bytes, ascending, and infinite where a front has fewer ways.
        seconds: (runs, ways) likewise.
    """

    start: Indices
    stop: Indices
    beside: Numbers
    weights: Numbers
    need: Numbers
    seconds: Numbers


class Found(NamedTuple):
    """A division of the chain, and a way for each module.

    Attributes:
        need: bytes at the peak, auxiliary nets included.
        beside: bytes of auxiliary nets.
        seconds: expected time.
        runs: (first unit, unit after the last, number of the way) of each module.
    """

    need: float
    beside: float
    seconds: float
    runs: list[tuple[int, int, int]]


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
        known: dict[int, Fronts] | None = None,
    ) -> None:
        self._runs, self._module, self._starts, self._allowed = runs, module, starts, allowed
        # Counted from the end where it is the last, so that the same number stands for it whatever their number.
        self._kinds = [-1 if index == count - 1 else likewise(index) for index in range(count)]
        self._fronts = {} if known is None else known
        for index, kind in enumerate(self._kinds):
            if kind not in self._fronts:
                self._fronts[kind] = self._all(index, count)

    def _all(self, index: int, count: int) -> Fronts:
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
        beside = np.array([own.beside for own in modules], float)
        return Fronts(start, stop, beside, beside + [own.weights for own in modules], need, seconds)

    def keeping(self, states: States) -> "LocalSearch":
        """The same search where more than its weights and its gradients is kept of a module."""
        other = copy(self)
        other._fronts = {
            kind: own._replace(
                beside=own.beside * (1 + states.always), need=own.need + states.own * own.weights[:, None]
            )
            for kind, own in self._fronts.items()
        }
        return other

    def fastest(self, limit: float) -> Way | None:
        """The fastest way that needs no more than `limit` bytes, auxiliary nets included; None if there is none."""
        found = self.found(limit)
        return found and self.way(found)

    def found(self, limit: float) -> Found | None:
        """See `fastest`.

        Auxiliary nets are many where there are many modules, and which of them is not known beforehand. So it may be
        one that is not quite the fastest.
        """
        for price in (0.0, 1.0):
            beside = 0.0
            for _ in range(_ROUNDS):
                found = self._divided(limit - beside, price)
                if found is None:
                    break
                if found.need <= limit:
                    return found
                # Of modules with less memory, which may be others: they are looked for again.
                beside = max(found.beside, beside + limit / 256)
        return None

    def way(self, found: Found) -> Way:
        """What was found, with what each unit computes again."""
        names = []
        for index, (start, stop, way) in enumerate(found.runs):
            own = self._module(index, start, stop)
            names.append(self._runs.choices(start, stop, own.end, way, own.shared))
        return Way([stop for _, stop, _ in found.runs], names, found.need, found.seconds)

    def least(self) -> float:
        """About the fewest bytes for which there is a way: the largest module is as small as can be."""
        first = [self._fronts[kind].need[:, 0] if len(self._fronts[kind].need) else np.zeros(0) for kind in self._kinds]
        best = self._best([np.zeros(len(need), np.int64) for need in first], first, np.maximum)
        return np.inf if best is None else best.need

    def _divided(self, limit: float, price: float) -> Found | None:
        """The fastest way in which no module needs more than `limit` bytes.

        With a `price` of seconds for each byte of auxiliary nets it is the one with the fewest of them.
        """
        ways, costs = [], []
        for fronts in (self._fronts[kind] for kind in self._kinds):
            way = (fronts.need <= limit).sum(1) - 1
            own = np.where(way < 0, np.inf, fronts.seconds[np.arange(len(way)), way] if len(way) else 0.0)
            ways.append(way)
            costs.append(own + price * fronts.beside)
        return self._best(ways, costs, np.add)

    def _best(self, ways: list[Indices], costs: list[Numbers], combine: np.ufunc) -> Found | None:
        """The division whose modules' costs, combined, are lowest; None if none is finite.

        Args:
            ways: for each module, of each of its runs the number of the way.
            costs: likewise its cost.
            combine: adds two costs, or takes the larger one.
        """
        size = self._starts[-1]
        best = np.full(size + 1, np.inf)
        best[0] = 0.0
        chosen = []
        for kind, cost in zip(self._kinds, costs, strict=True):
            fronts = self._fronts[kind]
            total = combine(best[fronts.start], cost)
            best, found = np.full(size + 1, np.inf), np.full(size + 1, -1)
            order = np.argsort(-total, kind="stable")  # of two values for a place, numpy keeps the later one
            best[fronts.stop[order]], found[fronts.stop[order]] = total[order], order
            chosen.append(found)
        if not np.isfinite(best[size]):
            return None
        stop, result = size, Found(0.0, 0.0, 0.0, [])
        for kind, way, found in reversed(list(zip(self._kinds, ways, chosen, strict=True))):
            fronts, run = self._fronts[kind], int(found[stop])
            number, start = int(way[run]), int(fronts.start[run])
            need = max(result.need, float(fronts.need[run, number]))
            beside, seconds = (
                result.beside + float(fronts.beside[run]),
                result.seconds + float(fronts.seconds[run, number]),
            )
            result = Found(need, beside, seconds, [(start, stop, number), *result.runs])
            stop = start
        return result._replace(need=result.need + result.beside)
