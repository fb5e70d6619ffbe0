"""Where a chain is cut, and the network that comes of it."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch

from localprop.division.partition import balanced, module_ends, most_modules, stage_ends
from localprop.errors import ChainError, ConfigError, listing, suggestion
from localprop.features import infer_layout
from localprop.heads import HEADS
from localprop.heads.common import Place
from localprop.memory.cost import Costs, Part, Reach, module_peak
from localprop.memory.part import Conditions, Cost
from localprop.methods import build_loss, varying
from localprop.network.kinetic import kinetic_weight
from localprop.network.loss import HeadLoss, LocalLoss, ModuleSpec
from localprop.network.module import LocalModule
from localprop.network.network import LocalNetwork
from localprop.settings.recipe import Recipe, Recomputation
from localprop.tracing.private import Weights

PARTITIONS = ("balanced", "compute", "stage")


class Division:
    """A backbone with everything settled but where to cut.

    Args:
        costs: its chain, and what is known of its costs.
        recipe: what the network is made of, resolved.
        spec: the modules, but for their places.
        step: of the step for which it is cut; what units compute again is the recipe's to say.
    """

    def __init__(self, costs: Costs, recipe: Recipe, spec: ModuleSpec, step: Conditions) -> None:
        self.costs, self.recipe, self.spec, self.step = costs, recipe, spec, step
        self.model, self.units = costs.model, costs.chain
        units = self.units
        self.layouts = [
            spec.source,
            *(
                infer_layout((1, *unit.shape), units.input_size, units.prefix_tokens, units.output_format)
                for unit in units
            ),
        ]

    @property
    def _placed(self) -> bool:
        """Whether heads depend on the place where they stand, not on the layout that they read alone."""
        return getattr(HEADS[self.spec.head], "needs_place", False)

    def loss(
        self, index: int, start: int, stop: int, ahead: int = 0, weights: Weights | None = None, **changes: Any
    ) -> LocalLoss:
        """The local loss of the module of units [start, stop).

        Args:
            index: which module.
            start: its first unit.
            stop: the unit after its last.
            ahead: how many units further its head reads.
            weights: "none" where only its cost is asked for.
            changes: of its spec.
        """
        spec = replace(
            self.spec,
            index=index,
            input=self.layouts[start],
            output=self.layouts[stop],
            following=tuple(zip(self.units[stop:], self.layouts[stop + 1 :], strict=True)),
            place=Place(self.model, self.units, self.layouts, stop + ahead, index, self.spec.count, weights),
            ahead=self.layouts[stop + ahead] if ahead else None,
            **changes,
        )
        return build_loss(self.recipe.method, spec, self.recipe.options)

    def ends(self) -> list[int]:
        """After how many units each module ends, as the recipe says.

        Raises:
            ChainError: the chain has no such cuts, or not so many modules.
            ConfigError: no such partition.
        """
        recipe, units = self.recipe, self.units
        for name in recipe.recompute_units or {}:
            units.position(name)  # there is such a unit
        if recipe.cuts is not None:
            ends = [*(units.position(name) for name in recipe.cuts), len(units)]
            if ends != sorted(set(ends)):
                names = listing(unit.name for unit in units)
                raise ChainError(f"cuts {listing(recipe.cuts)} are not in order and before the last unit of: {names}")
            return ends
        if recipe.partition == "stage":
            return self._balance(stage_ends(units), "memory", "stages, where the resolution changes")
        if recipe.partition in ("balanced", "compute"):
            aim: Literal["memory", "time"] = "memory" if recipe.partition == "balanced" else "time"
            return self._balance(list(range(1, len(units) + 1)), aim, "units")
        raise ConfigError(f"no partition is called {recipe.partition!r}; {suggestion(recipe.partition, PARTITIONS)}")

    def _balance(self, ends: list[int], aim: Literal["memory", "time"], what: str) -> list[int]:
        """The `count` of the possible `ends` with which the largest module is smallest, auxiliary nets included."""
        if self.spec.count == 1:
            return ends[-1:]
        min_depth = self.recipe.min_depth
        possible = module_ends(self.units, ends, min_depth)
        count, most = self.spec.count, most_modules(self.units, possible, min_depth)
        if count > most:
            blocks = sum(unit.depth for unit in self.units)
            depth = f", and a module takes at least {min_depth} of its {blocks} blocks" if most < len(ends) else ""
            raise ChainError(
                f"{count} modules asked for, but the backbone has {len(ends)} {what}{depth}: "
                f"at most {max(most, 1)}: {listing(self.units[end - 1].name for end in possible)}"
            )
        ends = possible
        starts = [0, *ends]
        cost = self._costs(aim)
        depths = [0, *accumulate(unit.depth for unit in self.units)]

        def allowed(index: int, i: int, j: int) -> float:
            start, stop = starts[i], starts[j]
            return cost(index, start, stop) if depths[stop] - depths[start] >= min_depth else float("inf")

        return [starts[j] for j in balanced(len(ends), count, allowed)]

    def _costs(self, aim: Literal["memory", "time"]) -> Callable[[int, int, int], float]:
        """The cost of module `index`, if it has units [start, stop): bytes at its peak, or expected time."""

        def unit(i: int, last: bool, conditions: Conditions) -> Cost:
            return self.costs.units(replace(conditions, recomputation=self._recomputation(i, last)))[i]

        first, beyond = replace(self.step, input_gradient=False), replace(self.step, ahead=True)

        task = self.spec.task.for_costs()
        target = task.target(self.spec.prediction)

        @cache
        def loss(index: int, start: int, stop: int) -> LocalLoss:
            with torch.random.fork_rng(devices=[]):
                return self.loss(index, start, stop, weights="none", task=task)

        @cache
        def auxiliary(index: int, start: int, stop: int, part: Part = "whole") -> Cost:
            # Of units with equal outputs any stands for all: their auxiliary nets cost the same, but for a head that
            # resembles what follows.
            start, stop = self._representative(start), stop if self._placed else self._representative(stop)
            step = replace(self.step, recomputation=self.recipe.cheap)
            own = loss(index, start, stop)
            return self.costs.auxiliary(own, self._shape(stop), self._shape(start), target, step, part)

        def ahead(index: int, start: int, stop: int) -> int:
            """How many units the head of a module reads ahead, if the next module has as many."""
            own = self._ahead(stop, len(self.units)) if 0 <= index < self.spec.count - 1 else 0
            return own if own and self._has_head(loss(index, start, stop)) else 0

        @cache
        def cost(index: int, start: int, stop: int) -> float:
            shared = min(ahead(index - 1, 0, start), stop - start)
            # The first unit of a module needs no gradient of its input, but for the head of the module before.
            own = [
                unit(i, i == stop - 1 or i < start + shared, self.step if i > start or shared else first)
                for i in range(start, stop)
            ]
            end = stop + ahead(index, start, stop)
            rest = auxiliary(index, start, stop, "rest" if end > stop else "whole")
            parts, reach = [*own, rest], None
            if end > stop:
                # The head reads what it would as that of a module that ends there.
                head = auxiliary(index, start, end, "judge")
                reach = Reach([unit(i, True, beyond) for i in range(stop, end)], head)
                parts += [*reach.units, reach.head]
            return module_peak(own, rest, shared, reach) if aim == "memory" else sum(part.seconds for part in parts)

        if self._placed or varying(self.recipe.options):
            return cost
        return lambda index, *units: cost(self._likewise(index), *units)

    def _likewise(self, index: int) -> int:
        """The first module that has a loss like that of a module: between the first and the last all have the same."""
        return min(index, 1) if index < self.spec.count - 1 else index

    def build(self, ends: list[int]) -> LocalNetwork:
        """The network with modules that end after these numbers of units."""
        first = next(self.model.parameters(), torch.empty(0))
        local_modules: list[LocalModule] = []
        shared = 0
        for index, (start, stop) in enumerate(pairwise([0, *ends])):
            ahead = self._ahead(stop, ends[index + 1]) if stop < len(self.units) else 0
            loss = self.loss(index, start, stop, ahead)
            local_modules.append(
                LocalModule(
                    self.model,
                    self.units[start:stop],
                    loss.to(first.device, first.dtype),
                    self.layouts[stop],
                    bool(self.recipe.recompute),
                    self.recipe.grad_checkpointing,
                    [self._recomputation(i, i == stop - 1) for i in range(start, stop)],
                    kinetic_weight(self.recipe.kinetic or 0.0, index, self.spec.count),
                )
            )
            if shared:
                local_modules[-1].share(shared, local_modules[-2])
            shared = ahead if ahead and self._has_head(loss) else 0
        return LocalNetwork(self.model, local_modules, self.units.input_size, self.recipe, self.spec.task)

    def _ahead(self, start: int, stop: int) -> int:
        """How many units of the module of units [start, stop) the head of the module before reads ahead."""
        blocks = count = 0
        for number, unit in enumerate(self.units[start : min(stop, len(self.units) - 1)], 1):
            if blocks >= (self.recipe.reach or 0):
                break
            blocks += unit.depth
            count = number if unit.depth else count
        return count

    def _has_head(self, loss: LocalLoss) -> bool:
        """Whether a local loss has a head that can read ahead."""
        if isinstance(loss, HeadLoss):
            if any(parameter.requires_grad for parameter in loss.task.parameters()):
                raise ConfigError("the criterion has weights, which no head that reads ahead trains; set reach to 0")
            return loss.head is not None
        raise ConfigError(
            f"reach is {self.recipe.reach}, but the loss of method {self.recipe.method} is not in two parts; derive it "
            "from localprop.HeadLoss, or set reach to 0"
        )

    def _recomputation(self, unit: int, last: bool) -> Recomputation:
        return self.recipe.recomputation(self.units[unit].name, last)

    def _shape(self, position: int) -> tuple[int, ...]:
        return self.units[position - 1].shape if position else self.units.input_size

    def _representative(self, position: int) -> int:
        if position in (0, len(self.units)):
            return position
        return next(p for p in range(1, position + 1) if self._shape(p) == self._shape(position))
