"""What the search tries: on which terms a step may be taken, the ways that there are on these, and simulated steps."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from typing import Literal, NamedTuple

from localprop.division.partition import most_modules
from localprop.division.resolve import with_methods_defaults
from localprop.heads import HEADS
from localprop.planning.planner import Planner
from localprop.planning.rows import Offloaded, PlanRow, Setting
from localprop.planning.search.costed import ExactWays, Kind, LocalWays
from localprop.planning.search.names import recipe_of
from localprop.planning.search.ways import States, Way
from localprop.settings.recipe import Frozen, Recipe

_MOST = 16
"""Modules: more bring little but auxiliary nets."""
_EIGHT_BIT = {"adamw": "adamw8bit", "adam": "adam8bit"}
"""What has the same rule of update, with moments in 8 bits."""


class Terms(NamedTuple):
    """On which terms a step is taken.

    Attributes:
        micro_batches: into which the batch is divided; None for as many as were asked for.
        sliced: whether units may run again in slices of these.
        opt: the optimizer; None for the one that was asked for.
        offload: what rests on the host, though nobody asked for it.
    """

    micro_batches: int | None = None
    sliced: bool = False
    opt: str | None = None
    offload: tuple[Offloaded, ...] = ()


@dataclass
class Trials:
    """Settings of one model, and what is known of them.

    Args:
        planner: simulates them.
        modules: the numbers of modules that were asked for.
        rows: what has been simulated.
        frozen: which units the planner's recipe freezes, though nobody asked for it. A first module is one apart.
    """

    planner: Planner
    modules: Sequence[int | Literal["max"]]
    rows: list[PlanRow]
    frozen: Frozen = ""
    _ways: dict[tuple[Kind, int, bool], ExactWays | LocalWays | None] = field(default_factory=dict)

    def offloads(self, kind: Kind) -> list[tuple[Offloaded, ...]]:
        """What may rest on the host, from nothing to all: that changes no bit, and needs CUDA."""
        planner, asked = self.planner, self.planner.optim
        found: list[tuple[Offloaded, ...]] = [()]
        if planner.offload and planner.device == "cuda":
            # Boundaries travel less than states do: in one direction each.
            if kind == "exact" and not asked.offload_boundaries:
                found.append((*found[-1], "boundaries"))
            if not asked.offload_optimizer:
                found.append((*found[-1], "optimizer"))
        return found

    @cached_property
    def optimizers(self) -> tuple[str | None, ...]:
        """The optimizer that was asked for, and one with smaller states that can be had."""
        other = _EIGHT_BIT.get(self.planner.optim.opt)
        return (None, other) if other and find_spec("torchao") else (None,)

    def parts(self, terms: Terms) -> int:
        """Micro-batches of a step."""
        return terms.micro_batches or self.planner.optim.micro_batches

    def ways(self, kind: Kind, terms: Terms) -> ExactWays | LocalWays | None:
        """All ways of a kind, whatever the optimizer; None where the model allows none."""
        key = kind, self.parts(terms), terms.sliced
        if key not in self._ways:
            self._ways[key] = self._exact(terms) if kind == "exact" else self._local(terms)
        return self._ways[key]

    def states(self, terms: Terms) -> States:
        """What is kept beside each weight."""
        optimizer = self.baseline(terms).step.parts["optimizer"] / max(self._weights, 1)
        waiting = float(self.parts(terms) > 1)
        boundaries = "boundaries" in terms.offload or self.planner.optim.offload_boundaries
        if self._away(terms):
            return States(waiting, optimizer, boundaries)
        return States(waiting + optimizer, 0.0, boundaries)

    def held(self, terms: Terms) -> int:
        """About the bytes of weights and of what the optimizer always keeps of them on the device."""
        parts = self.baseline(terms).step.parts
        return parts["parameters"] + (0 if self._away(terms) else parts["optimizer"])

    def static(self, terms: Terms) -> int:
        """About the bytes that are in use whatever is trained: weights, the optimizer's state, the batch."""
        entry, parts = self.baseline(terms).step.entry, self.parts(terms)
        return self.held(terms) + entry + (self._weights + entry * parts if parts > 1 else 0)

    def _away(self, terms: Terms) -> bool:
        return "optimizer" in terms.offload or self.planner.optim.offload_optimizer

    @cached_property
    def _weights(self) -> int:
        """Bytes of the weights that are trained."""
        return self.planner.trained_bytes()

    def baseline(self, terms: Terms) -> PlanRow:
        """End-to-end training in one module, whose optimizer has nothing to put on the host."""
        recipe = replace(self._exact_base, split_blocks=False)
        return self._simulated(self._setting(recipe, terms))

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

    def row(self, kind: Kind, way: Way, terms: Terms) -> PlanRow:
        """A simulated step of a way."""
        base = self._base(kind)
        ways = self.ways(kind, terms)
        assert ways is not None
        if kind == "exact" and len(way.ends) == 1 and not any(value != ways.usual for value in way.recomputation[0]):
            return self.baseline(terms)
        names = [unit.name for unit in self.planner.known(base.split_blocks).chain]
        again = sum(value not in ("none", "cheap") for module in way.recomputation for value in module)
        recipe = recipe_of(way, base, names, ways.usual)
        if self.frozen == "first":  # its cut says which units these are
            recipe = replace(recipe, freeze=None, freeze_modules=1)
        return self._simulated(self._setting(recipe, terms, again, terms.offload if len(way.ends) > 1 else ()))

    def _setting(
        self, recipe: Recipe, terms: Terms, again: int | None = None, offload: tuple[Offloaded, ...] = ()
    ) -> Setting:
        parts, opt = terms.micro_batches, terms.opt
        return Setting(recipe, again=again, micro_batches=parts, opt=opt, offload=offload, frozen=self.frozen)

    def _simulated(self, setting: Setting) -> PlanRow:
        for row in self.rows:
            if row.setting == setting:
                return row
        found = self.planner.row(setting)
        assert found is not None  # it is one of those that the model allows
        self.rows.append(found)
        return found

    def _base(self, kind: Kind) -> Recipe:
        """What all settings of a kind have in common."""
        if kind == "exact":
            return self._exact_base
        asked = self.planner.recipe
        recipe = locally(asked)
        full = with_methods_defaults(recipe)
        # To read ahead, to move its input and to be resembled is another thing for half a block than for a whole one.
        whole = full.reach or full.kinetic or getattr(HEADS.lookup(full.head or ""), "needs_place", False)
        return replace(recipe, split_blocks=recipe.split_blocks or not whole)

    def _exact(self, terms: Terms) -> ExactWays:
        recipe, base, ends = self.planner.recipe, self._base("exact"), None
        asked = self.modules[0] if len(self.modules) == 1 else None
        parts = self.parts(terms)
        if recipe.end_to_end and (asked or recipe.cuts):
            count = None if recipe.cuts or asked == "max" else asked
            ends = self.planner.division(replace(base, modules=count, cuts=recipe.cuts), parts).ends()
        return ExactWays(self.planner.division(base, parts), terms.sliced, ends)

    def _local(self, terms: Terms) -> LocalWays | None:
        base = self._base("local")
        units, ends = self.planner.known(base.split_blocks).chain, None
        most = most_modules(units, range(1, len(units) + 1), base.min_depth)
        open_ = len(self.modules) > 1 or self.planner.recipe.end_to_end
        least = 3 if self.frozen == "first" else 2
        asked = range(least, _MOST + 1) if open_ else self.modules
        counts = [most if count == "max" else count for count in asked]
        counts = [count for count in counts if 1 < count <= most]
        if base.cuts is not None:
            ends, counts = [*map(units.position, base.cuts), len(units)], [len(base.cuts) + 1]
        if not counts:
            return None
        divisions = [self.planner.division(replace(base, modules=count), self.parts(terms)) for count in counts]
        return LocalWays(divisions, terms.sliced, ends, self.frozen == "first")


def locally(recipe: Recipe) -> Recipe:
    """A recipe of local modules that is like another one, which may be of exact training."""
    if not recipe.end_to_end:
        return recipe
    open_ = replace(recipe, modules=None, cuts=None, recompute_units=None, grad_checkpointing=False)
    return replace(open_, method=Recipe.method)
