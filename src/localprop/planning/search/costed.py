"""The searches of a model: its units and auxiliary nets with their costs."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import accumulate
from typing import Literal

from torch import nn

from localprop.division.division import Division
from localprop.division.partition import module_ends, stage_ends
from localprop.memory.part import Cost
from localprop.planning.search.exact import ExactSearch
from localprop.planning.search.local import Fronts, LocalSearch, Module
from localprop.planning.search.runs import Options, Runs, Units
from localprop.planning.search.ways import States, Way
from localprop.settings.recipe import Recomputation

Kind = Literal["exact", "local"]
KINDS: tuple[Kind, ...] = "exact", "local"
_AGAIN: tuple[Recomputation, ...] = "none", "cheap", "whole"
_SLICES = 2, 4, 8
_EQUAL = 1.02
"""Times that differ by less are equal: then fewer modules are taken, since they learn better."""
_SIMPLER = 1e-4
"""What a unit has to bring that differs from the usual, as a part of the time of all units."""


@dataclass
class ExactWays:
    """Exact training of a model.

    Args:
        division: of end-to-end training with one module.
        sliced: whether units may run again in slices of the batch.
        ends: after how many units each module ends; None where that is open.
    """

    division: Division
    sliced: bool = False
    ends: Sequence[int] | None = None
    _searches: dict[States, ExactSearch] = field(default_factory=dict, init=False)

    @cached_property
    def _runs(self) -> Runs:
        units = units_of(self.division, True, self.sliced)
        return Runs(units, simpler=_SIMPLER * _seconds(units))

    def _search(self, states: States) -> ExactSearch:
        states = states._replace(always=0.0)
        if states not in self._searches:
            division = self.division
            whole, none = (division.costs.units(replace(division.step, recomputation=k)) for k in ("whole", "none"))
            forward = [again.seconds - once.seconds for again, once in zip(whole, none, strict=True)]
            own = [states.own * weights for weights in _weights(division)]
            more = 10 * _SIMPLER * _seconds(self._runs.units)
            idle = division.free(0) if division.frozen else 0
            end, away = partial(division.end, 0, 0), states.boundaries
            self._searches[states] = ExactSearch(self._runs, forward, end, self.ends, own, more, idle, away)
        return self._searches[states]

    @property
    def usual(self) -> Recomputation:
        """What a unit computes again that a recipe does not name."""
        return self.division.recipe.cheap

    def least(self, states: States) -> float:
        """The fewest bytes for which there is a way."""
        return float(self._search(states).front.need[0])

    def most(self, states: States) -> float:
        """The bytes that the fastest way needs."""
        return float(self._search(states).front.need[-1])

    def fastest(self, limit: float, states: States) -> Way | None:
        """The fastest way within a limit in bytes; None if there is none."""
        search = self._search(states)
        number = search.front.within(limit)
        return None if number is None else search.way(number)


@dataclass
class LocalWays:
    """Local training of a model.

    Args:
        divisions: of each number of modules that may be taken.
        sliced: whether units may run again in slices of the batch.
        ends: after how many units each module ends; None where that is open.
        apart: whether the first units, which are frozen, are a module of their own.
    """

    divisions: Sequence[Division]
    sliced: bool = False
    ends: Sequence[int] | None = None
    apart: bool = False
    _kept: dict[States, list[LocalSearch]] = field(default_factory=dict, init=False)

    @cached_property
    def _searches(self) -> list[LocalSearch]:
        first = self.divisions[0]
        units = units_of(first, False, self.sliced)
        runs, known = Runs(units, simpler=_SIMPLER * _seconds(units)), dict[int, Fronts]()
        return [self._local(division, runs, known if division.alike else {}) for division in self.divisions]

    def _local(self, division: Division, runs: Runs, known: dict[int, Fronts]) -> LocalSearch:
        units, least = division.units, division.recipe.min_depth
        places = stage_ends(units) if division.recipe.partition == "stage" else range(1, len(units) + 1)
        ends = self.ends or module_ends(units, places, least)
        weights = [0, *accumulate(_weights(division))]

        def module(index: int, start: int, stop: int) -> Module:
            return Module(
                division.end(index, start, stop),
                division.shared(index, start, stop),
                division.auxiliary_bytes(index, start, stop),
                weights[stop] - weights[start],
            )

        first = len(division.frozen) if self.apart else 0

        def allowed(start: int, stop: int) -> bool:
            if start < first:
                return (start, stop) == (0, first)
            return self.ends is not None or sum(unit.depth for unit in units[start:stop]) >= least

        return LocalSearch(runs, division.spec.count, module, [0, *ends], division.likewise, allowed, known)

    @property
    def usual(self) -> Recomputation:
        """What a unit computes again that a recipe does not name."""
        return self.divisions[0].recipe.cheap

    def _keeping(self, states: States) -> list[LocalSearch]:
        if states not in self._kept:
            self._kept[states] = [search.keeping(states) for search in self._searches]
        return self._kept[states]

    def least(self, states: States) -> float:
        """About the fewest bytes for which there is a way."""
        return min(search.least() for search in self._keeping(states))

    def most(self, states: States) -> float:
        """About the bytes that the fastest way needs."""
        way = self.fastest(2.0**50, states)
        return way.need if way else self.least(states)

    def fastest(self, limit: float, states: States) -> Way | None:
        """The fastest way within a limit in bytes; of nearly equally fast ones that with the fewest modules."""
        all_found = [(search, found) for search in self._keeping(states) if (found := search.found(limit))]
        best = min((found.seconds for _, found in all_found), default=0.0)
        return next((search.way(found) for search, found in all_found if found.seconds <= _EQUAL * best), None)


def _weights(division: Division) -> list[int]:
    """Bytes of each unit's weights that are trained."""
    own = [{id(p): p for p in unit.used(division.model, nn.Module.parameters)}.values() for unit in division.units]
    sizes = [sum(p.numel() * p.element_size() for p in parameters if p.requires_grad) for parameters in own]
    return [0 if i in division.frozen else size for i, size in enumerate(sizes)]


def _seconds(units: Units) -> float:
    """Of all units, each in the first of its options."""
    return sum(next(iter(options.values())).seconds for options in units.inner)


def units_of(division: Division, exact: bool, sliced: bool) -> Units:
    """What the units of a division cost, by what they compute again.

    Args:
        division: the division.
        exact: whether the input of a module's first unit needs a gradient, where a module before is trained.
        sliced: whether units may run again in slices of the batch: those that need much at once.
    """
    costs, usual = division.costs, division.recipe.cheap
    kinds = sorted(_AGAIN, key=lambda kind: kind != usual)  # the usual one first
    large = max(cost.backward for cost in costs.units(division.step)) / 2

    def options(i: int, input_gradient: bool) -> Options:
        step = replace(division.step, input_gradient=input_gradient)
        slices = [f"whole/{count}" for count in _SLICES if not step.batch_size % count]
        if not sliced or costs.unit(i, division.step).backward < large or costs.unsliced(i):
            slices = []
        return _different({kind: costs.unit(i, replace(step, recomputation=kind)) for kind in (*kinds, *slices)})

    count, free = len(division.units), division.free(0) if exact else -1
    inner = [options(i, i > free) for i in range(count)]
    first = inner if exact else [options(i, False) for i in range(count)]
    last = ("none", "cheap", *(f"whole/{count}" for count in _SLICES))
    return Units(inner, first, last, ahead=(usual,), frozen=frozenset() if exact else division.frozen)


def _different(options: dict[Recomputation, Cost]) -> Options:
    """The options without those that cost what one before costs: "cheap" of a unit that has nothing cheap."""
    kept: dict[Recomputation, Cost] = {}
    for kind, cost in options.items():
        if cost not in kept.values():
            kept[kind] = cost
    return kept
