"""What a run of consecutive units needs as one module: all ways to recompute its units, weighed by memory and time."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from localprop.memory.cost import End
from localprop.memory.part import Cost
from localprop.planning.search.fronts import MOST, Front, front
from localprop.settings.recipe import Recomputation

Options = Mapping[Recomputation, Cost]
"""What a unit costs by what it computes again in backward."""
_Fronts = dict[bool, Front]
"""Of a place in a run, by whether the output of the unit before is kept already: what the rest of the run needs."""


@dataclass(frozen=True)
class Units:
    """The costs of a chain's units.

    Attributes:
        inner: of each unit, where another one of its module is before it.
        first: of each unit as the first of its module, or where all units of its module before it are frozen.
        last: what the last unit of a module may compute again.
        ahead: what a unit may compute again that the head of the module before reads.
        frozen: numbers of the units that are not trained.
    """

    inner: Sequence[Options]
    first: Sequence[Options]
    last: Collection[Recomputation]
    ahead: Collection[Recomputation] = ()
    frozen: Collection[int] = ()

    def __len__(self) -> int:
        return len(self.inner)

    def output(self, unit: int) -> int:
        """Bytes of a unit's output."""
        return next(iter(self.inner[unit].values())).output

    def free(self, start: int) -> int:
        """Of a module from unit `start` on, how many first units need no gradient of their input."""
        stop = next((i for i in range(start, len(self)) if i not in self.frozen), len(self) - 1)
        return stop + 1 - start

    def gradients(self, unit: int) -> int:
        """Bytes of the gradients of a unit's weights."""
        return next(iter(self.inner[unit].values())).gradients

    def options(self, unit: int, last: bool, first: bool = False, ahead: bool = False) -> Options:
        """What a unit may compute again, and what it costs then, where it is in a module."""
        costs = self.first[unit] if first and not ahead else self.inner[unit]
        allowed = self.ahead if ahead else self.last if last else costs.keys()
        return {name: cost for name, cost in costs.items() if name in allowed}


class _Place(NamedTuple):
    """Where a unit is in a run.

    Attributes:
        given: bytes of its input; 0 where that is the input of the run, which others count.
        waiting: bytes in use in its backward of what was made before, and of the run's end.
        last: whether it is the last.
    """

    given: int
    waiting: int
    last: bool


class Runs:
    """The fronts of runs of a chain's units, each found once.

    This is `module_peak` read from the end: what the rest of a run needs beside what was kept before does not depend on
    what that is. So the fronts of the rest serve every start.

    Args:
        units: the costs.
        most: ways that a front keeps.
        simpler: seconds that each unit has to bring that does not do what its first option says: else it does that.
    """

    def __init__(self, units: Units, most: int = MOST, simpler: float = 0.0) -> None:
        self.units, self.most = units, most
        self._simpler = simpler
        self._rests: dict[tuple[int, End], list[_Fronts]] = {}
        self._gradients = [0]
        for i in range(len(units)):
            self._gradients.append(self._gradients[-1] + units.gradients(i))

    def front(self, start: int, stop: int, end: End, shared: int = 0) -> Front:
        """The front of the units [start, stop) as one module, in bytes beside its input.

        Args:
            start: the first unit.
            stop: the unit after the last.
            end: what comes after the forward of the last.
            shared: how many of its first units the head of the module before has read.
        """
        return self._begin(start, stop, end, shared)[0][0][True]

    def choices(self, start: int, stop: int, end: End, way: int, shared: int = 0) -> list[Recomputation]:
        """What each unit computes again in one way of `front`; the other arguments as there."""
        places = self._begin(start, stop, end, shared)
        for unit in range(start + len(places), stop):
            places.append((self._rest(unit, stop, end), self.units.options(unit, unit == stop - 1)))
        names: list[Recomputation] = []
        kept = True
        for fronts, options in places:
            name = list(options)[fronts[kept].choice[way]]
            way, kept = int(fronts[kept].after[way]), options[name].keeps_output
            names.append(name)
        return names

    def _begin(self, start: int, stop: int, end: End, shared: int) -> list[tuple[_Fronts, Options]]:
        """The fronts of the rests of a run from its first unit on, and from its other shared ones; and their options.

        They differ from those inside of a run.
        """
        count = shared or min(self.units.free(start), stop - start)
        after, found = self._rest(start + count, stop, end), list[tuple[_Fronts, Options]]()
        for unit in reversed(range(start, start + count)):
            options = self.units.options(unit, unit == stop - 1, not shared, shared > 0)
            given = 0 if unit == start else self.units.output(unit - 1)
            place = _Place(given, self._waiting(unit, stop, end), unit == stop - 1)
            after = {kept: self._before(options, after, place, end, kept) for kept in (False, True)}
            found.insert(0, (after, options))
        return found

    def _rest(self, start: int, stop: int, end: End) -> _Fronts:
        """The fronts of the units [start, stop), where others are before them; of none, those of the end."""
        if (stop, end) not in self._rests:
            one, none = np.ones(1), np.zeros(1, np.int64)
            # The output is there anyway.
            top = {True: end.top, False: end.top + self.units.output(stop - 1)}
            self._rests[stop, end] = [{kept: Front(one * top[kept], one * end.seconds, none, none) for kept in top}]
        rests = self._rests[stop, end]
        for unit in range(stop - len(rests), start - 1, -1):
            options = self.units.options(unit, unit == stop - 1)
            place = _Place(self.units.output(unit - 1), self._waiting(unit, stop, end), unit == stop - 1)
            before = {cost.keeps_output for cost in (*self.units.inner[unit - 1].values(),)}
            before |= {cost.keeps_output for cost in self.units.first[unit - 1].values()}
            rests.append({kept: self._before(options, rests[-1], place, end, kept) for kept in before})
        return rests[stop - start]

    def _waiting(self, unit: int, stop: int, end: End) -> int:
        return end.waiting + self._gradients[stop] - self._gradients[unit + 1]

    def _before(self, options: Options, after: _Fronts, place: _Place, end: End, kept: bool) -> Front:
        """The front of a unit and of what follows it.

        Args:
            options: the unit's.
            after: the fronts of what follows.
            place: where the unit is.
            end: of the run.
            kept: whether its input is kept already.
        """
        ways = []
        for number, cost in enumerate(options.values()):
            rest = after[cost.keeps_output]
            own = cost.output if cost.keeps_output else 0
            backward = cost.backward + place.waiting + (0 if place.last else own)
            need = np.maximum(rest.need + cost.kept + own, backward)
            # Of units that a head has read ahead, too: there they have taken more.
            forward = cost.forward + end.given
            if kept or not cost.keeps_input:
                need = np.maximum(need, forward + (0 if kept else place.given))
            else:
                need = np.maximum(need, forward) + place.given
            seconds = rest.seconds + cost.seconds + (self._simpler if number else 0.0)
            ways.append((need, seconds, np.full(len(need), number), np.arange(len(need))))
        need, seconds, choice, following = (np.concatenate(parts) for parts in zip(*ways, strict=True))
        return front(need, seconds, choice, following, self.most)
