"""Where a chain is cut, and the network that comes of it."""

from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Literal

import torch

from localprop.division.partition import balanced, balanced_exact, module_ends, most_modules, stage_ends
from localprop.division.places import Places
from localprop.errors import ChainError, ConfigError, counted, listing, suggestion
from localprop.network.kinetic import kinetic_weight
from localprop.network.loss import Frozen
from localprop.network.module import LocalModule
from localprop.network.network import LocalNetwork

PARTITIONS = ("balanced", "compute", "stage")


class Division(Places):
    """A backbone with everything settled but where to cut; arguments as of `Places`."""

    def ends(self) -> list[int]:
        """After how many units each module ends, as the recipe says.

        Raises:
            ChainError: the chain has no such cuts, or not so many modules.
            ConfigError: no such partition.
        """
        recipe, units = self.recipe, self.units
        for name in recipe.recompute_units or {}:
            units.position(name)  # there is such a unit
        self._require_frozen()
        self.require_slices()
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

    def _require_frozen(self) -> None:
        """Checks that what is to be frozen is there, and leaves something to train."""
        recipe, units = self.recipe, self.units
        for pattern in recipe.freeze or ():
            own = replace(recipe, freeze=(pattern,))
            if not any(own.freezes(unit.name, last=False) for unit in units):
                units.position(pattern)  # which says what there is
        left = any(unit.parameters for i, unit in enumerate(units) if i not in self.frozen)
        if recipe.freeze_modules >= self.spec.count or not left:
            what = f"the {counted(self.spec.count, 'module')}" if left else "the backbone"
            raise ChainError(f"nothing is left to train in {what}: freeze less, or fewer modules")
        adapted = {i for i, unit in enumerate(units) if unit.adapts(self.model)} if self.adapted else set()
        if adapted and self.frozen.issuperset(adapted):
            raise ChainError("every unit that has adapters is frozen: freeze less, or leave out --lora")

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
        depths = [0, *accumulate(unit.depth for unit in self.units)]

        def allowed(index: int, i: int, j: int) -> float:
            start, stop = starts[i], starts[j]
            return self.cost(index, start, stop, aim) if depths[stop] - depths[start] >= min_depth else float("inf")

        if self.recipe.end_to_end and aim == "memory":
            outputs = [unit.output for unit in self.costs.units(self.step)]
            return [starts[j] for j in balanced_exact(len(ends), count, allowed, lambda j: outputs[starts[j] - 1])]
        return [starts[j] for j in balanced(len(ends), count, allowed)]

    def build(self, ends: list[int]) -> LocalNetwork:
        """The network with modules that end after these numbers of units."""
        first = next(self.model.parameters(), torch.empty(0))
        local_modules: list[LocalModule] = []
        shared = 0
        first_modules = range(ends[self.recipe.freeze_modules - 1] if self.recipe.freeze_modules else 0)
        for index, (start, stop) in enumerate(pairwise([0, *ends])):
            ahead = self._ahead(stop, ends[index + 1]) if stop < len(self.units) else 0
            idle = self.idle(start, stop) or (index < self.recipe.freeze_modules and not self.recipe.end_to_end)
            frozen = [self.units[i] for i in range(start, stop) if i in self.frozen or i in first_modules]
            for unit in frozen:
                unit.freeze(self.model)
            loss = Frozen(self.spec) if idle else self.loss(index, start, stop, ahead)
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
                    self.units[start:stop] if self.adapted else frozen,
                )
            )
            if shared:
                local_modules[-1].share(shared, local_modules[-2])
            shared = ahead if ahead and not idle and self._has_head(loss) else 0
        return LocalNetwork(self.model, local_modules, self.units.input_size, self.recipe, self.spec.task)
