"""Finds the fastest settings within a budget, and those that no other beats; each of them is simulated."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from localprop.division.partition import most_modules
from localprop.division.resolve import with_methods_defaults
from localprop.errors import PlanError
from localprop.heads import HEADS
from localprop.planning.planner import Planner
from localprop.planning.rows import PlanRow, Setting
from localprop.planning.search.costed import ExactWays, Kind, LocalWays
from localprop.planning.search.names import recipe_of
from localprop.planning.search.ways import Way
from localprop.report.formats import format_bytes
from localprop.settings.recipe import Recipe

_ROUNDS = 5
_CLOSE = 0.01
"""Part of a budget that may be left over without another look for what is faster."""
_POINTS = 3
"""Settings of a front that are simulated, beside the fastest."""
_NEARLY = 1.02
"""What is called the least memory, against what that is."""
_MOST = 16
"""Modules: more bring little but auxiliary nets."""
_DEEPEST = 4
"""How much less memory slices may be expected to need at most."""
_LIKELY = 1.15
"""Against the budget, what a setting may be expected to need that is looked at with more micro-batches."""


class Parts(NamedTuple):
    """How a batch is divided.

    Attributes:
        micro_batches: into so many, which go through all modules one after another.
        sliced: whether units may run again in slices of these.
    """

    micro_batches: int
    sliced: bool = False


@dataclass
class Finder:
    """Finds settings of one model.

    Args:
        planner: simulates them.
        modules: the numbers of modules that were asked for.
        rows: what has been simulated.
    """

    planner: Planner
    modules: Sequence[int | Literal["max"]]
    rows: list[PlanRow]
    _ways: dict[tuple[Kind, Parts], ExactWays | LocalWays | None] = field(default_factory=dict)

    def front(self, kind: Kind) -> list[PlanRow]:
        """Settings from the one with the least memory to the fastest, none of which is beaten by another in both."""
        parts = Parts(self.planner.optim.micro_batches)
        ways = self._all(kind, parts)
        if ways is None:
            return []
        # The very least takes much time for little.
        least = _NEARLY * ways.least
        limits = [least * max(ways.most / least, 1.0) ** (i / _POINTS) for i in range(_POINTS + 1)]
        found = [way for limit in limits if (way := ways.fastest(1.001 * limit))]
        rows = [self._row(kind, way, parts) for way in found]
        best = [row for row in rows if not any(_beats(other, row) for other in rows)]
        return [row for i, row in enumerate(best) if row not in best[:i]]

    def fitting(self, kind: Kind, budget: int) -> PlanRow | None:
        """The fastest setting of a kind within `budget` bytes.

        The batch is divided only where nothing fits without: first into slices in which single units run again, then
        into as few micro-batches as can be. None where the model allows no setting of this kind, or where nothing fits
        even with one image at a time.
        """
        ways = self._all(kind, Parts(self.planner.optim.micro_batches))
        if ways is None:
            return None
        found = (self._fastest(kind, budget, parts) for parts in self._likely(budget, ways.least))
        return next((row for row in found if row), None)

    def nothing_fits(self, kind: Kind, budget: int) -> PlanError:
        """What is said where nothing fits."""
        parts = Parts(self.planner.batch_size)
        ways = self._all(kind, parts)
        assert ways is not None
        way = ways.fastest(1.001 * ways.least)
        assert way is not None
        least = self._row(kind, way, parts)
        return PlanError(
            f"nothing fits {format_bytes(budget)}: {least.setting.name} with 1 image at a time takes "
            f"{format_bytes(least.peak)}; choose a smaller model or smaller images, or raise --budget"
        )

    def _likely(self, budget: int, least: float) -> Iterator[Parts]:
        """How the batch may be divided so that something may fit, in the order in which that is tried."""
        first, images = self.planner.optim.micro_batches, self.planner.batch_size
        weights = sum(self._baseline(first).step.parts[part] for part in ("parameters", "optimizer"))
        yield Parts(first)
        if weights + least / _DEEPEST < _LIKELY * budget:
            yield Parts(first, sliced=True)
        for count in (count for count in range(first + 1, images + 1) if images % count == 0):
            if count == images or weights + least * first / count < _LIKELY * budget:
                yield Parts(count)

    def _fastest(self, kind: Kind, budget: int, parts: Parts) -> PlanRow | None:
        """The fastest setting within `budget` bytes with the batch in `parts`; None if there is none.

        What a step needs is composed of costs, for all settings at once. The one that this finds is simulated; where
        that says something else, it is looked for again.
        """
        if kind == "exact" and self._baseline(parts.micro_batches).peak <= budget:
            return self._baseline(parts.micro_batches)
        ways, best = self._all(kind, parts), None
        assert ways is not None
        beside: float = self._static(parts.micro_batches)
        for _ in range(_ROUNDS):
            way = ways.fastest(budget - beside) or (None if best else ways.fastest(1.001 * ways.least))
            if way is None:
                break
            row = self._row(kind, way, parts)
            needed = row.peak - way.need
            if row.peak > budget:
                if way.need <= 1.002 * ways.least:
                    break
                beside = needed
                continue
            if best is None or row.seconds < best.seconds:
                best = row
            if row.peak > (1 - _CLOSE) * budget or needed >= beside:
                break
            beside = needed
        return best

    def _static(self, parts: int) -> int:
        """About the bytes that are in use whatever is trained: weights, the optimizer's state, the batch."""
        step = self._baseline(parts).step
        whole = step.parts["parameters"] + step.parts["optimizer"] + step.entry
        return whole + (self._weights + step.entry * parts if parts > 1 else 0)

    @property
    def _weights(self) -> int:
        """Bytes of the weights that are trained."""
        return self.planner.trained_bytes()

    def _baseline(self, parts: int) -> PlanRow:
        return self._simulated(Setting(replace(self._exact_base, split_blocks=False)), parts)

    @property
    def _exact_base(self) -> Recipe:
        """What all exact settings have in common."""
        freeze = self.planner.recipe.freeze
        return Recipe(method="end-to-end", modules=1, split_blocks=True, kinetic=self._kinetic, freeze=freeze)

    @property
    def _kinetic(self) -> float | None:
        """Weight of the kinetic term in exact training, where that is what was asked for."""
        recipe = self.planner.recipe
        return recipe.kinetic or None if recipe.end_to_end else None

    def _row(self, kind: Kind, way: Way, parts: Parts) -> PlanRow:
        base = self._base(kind)
        ways = self._all(kind, parts)
        assert ways is not None
        if kind == "exact" and len(way.ends) == 1 and not any(value != ways.usual for value in way.recomputation[0]):
            return self._baseline(parts.micro_batches)
        names = [unit.name for unit in self.planner.known(base.split_blocks).chain]
        again = sum(value not in ("none", "cheap") for module in way.recomputation for value in module)
        return self._simulated(Setting(recipe_of(way, base, names, ways.usual), again=again), parts.micro_batches)

    def _simulated(self, setting: Setting, parts: int) -> PlanRow:
        for row in self.rows:
            if (row.setting, row.micro_batches) == (setting, parts):
                return row
        found = self.planner.row(setting, parts)
        assert found is not None  # it is one of those that the model allows
        self.rows.append(found)
        return found

    def _all(self, kind: Kind, parts: Parts) -> ExactWays | LocalWays | None:
        """All ways of a kind, with the batch in `parts`; None where the model does not allow it."""
        if (kind, parts) not in self._ways:
            self._ways[kind, parts] = self._exact(parts) if kind == "exact" else self._local(parts)
        return self._ways[kind, parts]

    def _base(self, kind: Kind) -> Recipe:
        """What all settings of a kind have in common."""
        if kind == "exact":
            return self._exact_base
        recipe = self.planner.recipe
        if recipe.end_to_end:
            return Recipe(split_blocks=True, freeze=recipe.freeze)
        full = with_methods_defaults(recipe)
        # To read ahead, to move its input and to be resembled is another thing for half a block than for a whole one.
        whole = full.reach or full.kinetic or getattr(HEADS.lookup(full.head or ""), "needs_place", False)
        return replace(recipe, split_blocks=recipe.split_blocks or not whole)

    def _exact(self, parts: Parts) -> ExactWays:
        recipe, base, ends = self.planner.recipe, self._base("exact"), None
        asked = self.modules[0] if len(self.modules) == 1 else None
        if recipe.end_to_end and (asked or recipe.cuts):
            count = None if recipe.cuts or asked == "max" else asked
            ends = self.planner.division(replace(base, modules=count, cuts=recipe.cuts), parts.micro_batches).ends()
        return ExactWays(self.planner.division(base, parts.micro_batches), parts.sliced, ends)

    def _local(self, parts: Parts) -> LocalWays | None:
        base = self._base("local")
        units, ends = self.planner.known(base.split_blocks).chain, None
        most = most_modules(units, range(1, len(units) + 1), base.min_depth)
        open_ = len(self.modules) > 1 or self.planner.recipe.end_to_end
        asked = range(2, _MOST + 1) if open_ else self.modules
        counts = [most if count == "max" else count for count in asked]
        counts = [count for count in counts if 1 < count <= most]
        if base.cuts is not None:
            ends, counts = [*map(units.position, base.cuts), len(units)], [len(base.cuts) + 1]
        if not counts:
            return None
        divisions = [self.planner.division(replace(base, modules=count), parts.micro_batches) for count in counts]
        optimizer = self._baseline(parts.micro_batches).step.parts["optimizer"]
        factor = 1 + optimizer / max(self._weights, 1) + (parts.micro_batches > 1)
        return LocalWays(divisions, factor, parts.sliced, ends)


def _beats(one: PlanRow, other: PlanRow) -> bool:
    """Whether one setting is better in one of memory and time, and no worse in the other."""
    ours, theirs = ((row.peak, row.seconds) for row in (one, other))
    return ours != theirs and all(a <= b for a, b in zip(ours, theirs, strict=True))
