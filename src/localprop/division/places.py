"""What modules of a division cost, wherever they might be cut: found before it is known where they are."""

from dataclasses import replace
from typing import Any, Literal

import torch

from localprop.errors import ConfigError
from localprop.features import infer_layout
from localprop.heads import HEADS
from localprop.heads.common import Place
from localprop.memory.cost import Costs, End, Part, Reach, module_end, module_peak
from localprop.memory.part import Conditions, Cost
from localprop.memory.slices import slice_size
from localprop.methods import METHODS, build_loss, varying
from localprop.network.loss import HeadLoss, LocalLoss, ModuleSpec
from localprop.settings.recipe import Recipe, Recomputation, runs_again
from localprop.tracing.blocks import has_adapters
from localprop.tracing.private import Weights


class Places:
    """A backbone with everything settled but where to cut.

    Args:
        costs: its chain, and what is known of its costs.
        recipe: what the network is made of, resolved.
        spec: the modules, but for their places.
        step: of the step for which it is cut; what units compute again is the recipe's to say.

    Attributes:
        adapted: whether the backbone has adapters: all else in it is frozen then, the statistics of batch norm too.
        frozen: numbers of the units that are not trained.
    """

    def __init__(self, costs: Costs, recipe: Recipe, spec: ModuleSpec, step: Conditions) -> None:
        self.costs, self.recipe, self.spec = costs, recipe, spec
        self.model, self.units = costs.model, costs.chain
        self._found: dict[tuple[int, int, int], LocalLoss] = {}
        self._known: dict[tuple[int, int, int, str], float] = {}
        units, self.adapted = self.units, has_adapters(self.model)
        self.frozen = frozenset(
            i
            for i, unit in enumerate(units)
            if recipe.freezes(unit.name, i + 1 == len(units)) or (self.adapted and not unit.trains(self.model))
        )
        self.step = replace(step, frozen=self.frozen)
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
            span=(start, stop),
            **changes,
        )
        return build_loss(self.recipe.method, spec, self.recipe.options)

    def idle(self, start: int, stop: int) -> bool:
        """Whether the module of units [start, stop) only runs in local training, because nothing in it is trained.

        The last module's loss is the network's, whatever is trained.
        """
        local = not self.recipe.end_to_end and stop < len(self.units)
        return local and self.frozen.issuperset(range(start, stop))

    def free(self, start: int) -> int:
        """Up to which unit none in the module that begins with unit `start` needs a gradient of its input.

        That is the first trained one of the module; in exact training of all modules.
        """
        first = 0 if self.recipe.end_to_end else start
        return next((i for i in range(first, len(self.units)) if i not in self.frozen), len(self.units) - 1)

    def require_slices(self) -> None:
        """Raises ConfigError where a unit is to run again in slices of the batch, and cannot."""
        for i, unit in enumerate(self.units):
            count = runs_again(self._recomputation(i, last=False))
            if count > 1:
                slice_size(unit.name, self.step.batch_size, count)
                if why := self.costs.unsliced(i):
                    raise ConfigError(f"unit {unit.name} cannot run in slices of the batch: {why}; take whole for it")

    @property
    def alike(self) -> bool:
        """Whether all modules between the first and the last have the same loss, whatever their number."""
        return not (self._placed or varying(self.recipe.options))

    def likewise(self, index: int) -> int:
        """The first module that has a loss like that of a module."""
        return min(index, 1) if self.alike and index < self.spec.count - 1 else index

    def cost(self, index: int, start: int, stop: int, aim: Literal["memory", "time"]) -> float:
        """The cost of module `index`, if it has units [start, stop): bytes at its peak, or expected time."""
        index = self.likewise(index)
        key = index, start, stop, aim
        if key not in self._known:
            shared = self.shared(index, start, stop)
            # The head of the module before needs the gradient of its input.
            first, free = replace(self.step, input_gradient=False), -1 if shared else self.free(start)
            own = [
                self._unit(i, i == stop - 1, i < start + shared, first if i <= free else self.step)
                for i in range(start, stop)
            ]
            if aim == "memory":
                self._known[key] = module_peak(own, self.end(index, start, stop), shared)
            else:
                # A head that reads ahead takes the time of the module whose units it reads: it is computed there.
                reads = stop + self._read(index, start, stop)
                parts = [*own]
                if not self.idle(start, stop):
                    parts.append(self._auxiliary(index, start, stop, "rest" if reads > stop else "whole"))
                if shared:
                    before = self._reach(self.likewise(index - 1), start, start + shared)
                    parts += [*before.units, before.head]
                self._known[key] = sum(part.seconds for part in parts)
        return self._known[key]

    def shared(self, index: int, start: int, stop: int) -> int:
        """How many of the first units of module `index` the head of the module before reads."""
        return min(self._read(self.likewise(index - 1), 0, start), stop - start) if index else 0

    def end(self, index: int, start: int, stop: int) -> End:
        """What comes after the forward of module `index`, if it has units [start, stop).

        If its head reads ahead, the next module is taken to have as many blocks as it reads.
        """
        if self.recipe.end_to_end and stop < len(self.units):
            # In exact training the gradient of its output is there before it runs again.
            return End(top=self._output(stop), waiting=0, given=self._output(stop))
        if self.idle(start, stop):
            return End(top=0, waiting=0)
        index = self.likewise(index)
        end = stop + self._read(index, start, stop)
        if end == stop:
            return module_end(self._auxiliary(index, start, stop), self._output(stop))
        reach = self._reach(index, stop, end)
        return module_end(self._auxiliary(index, start, stop, "rest"), self._output(stop), reach)

    def auxiliary_bytes(self, index: int, start: int, stop: int) -> int:
        """Bytes of the weights of the auxiliary nets of module `index`, if it has units [start, stop)."""
        if self.idle(start, stop):
            return 0
        weights = self._loss(self.likewise(index), *self._alike(start, stop)).parameters()
        return sum(weight.numel() * weight.element_size() for weight in weights)

    def _reach(self, index: int, stop: int, end: int) -> Reach:
        """What the head of module `index` reads, which ends after unit `stop`, up to unit `end`."""
        beyond = replace(self.step, ahead=True)
        # The head reads what it would as that of a module that ends there.
        units = [self._unit(i, False, True, beyond) for i in range(stop, end)]
        return Reach(units, self._auxiliary(index, 0, end, "judge"))

    def _unit(self, i: int, last: bool, shared: bool, conditions: Conditions) -> Cost:
        return self.costs.unit(i, replace(conditions, recomputation=self._recomputation(i, last, shared)))

    def _output(self, stop: int) -> int:
        return self._unit(stop - 1, True, False, self.step).output

    def _loss(self, index: int, start: int, stop: int) -> LocalLoss:
        """A local loss, without weights, to find its cost."""
        key = index, start, stop
        if key not in self._found:
            with torch.random.fork_rng(devices=[]):
                self._found[key] = self.loss(index, start, stop, weights="none", task=self.spec.task.for_costs())
        return self._found[key]

    def _alike(self, start: int, stop: int) -> tuple[int, int]:
        if getattr(METHODS[self.recipe.method], "needs_units", False):
            return start, stop
        # Of units with equal outputs any stands for all: their auxiliary nets cost the same, but for a head that
        # resembles what follows.
        return self._representative(start), stop if self._placed else self._representative(stop)

    def _auxiliary(self, index: int, start: int, stop: int, part: Part = "whole") -> Cost:
        start, stop = self._alike(start, stop)
        step = replace(self.step, recomputation=self.recipe.cheap)
        target = self.spec.task.for_costs().target(self.spec.prediction)
        own = self._loss(index, start, stop)
        return self.costs.auxiliary(own, self._shape(stop), self._shape(start), target, step, part)

    def _read(self, index: int, start: int, stop: int) -> int:
        """How many units the head of a module reads ahead, if the next module has as many."""
        reads = 0 <= index < self.spec.count - 1 and not self.idle(start, stop)
        own = self._ahead(stop, len(self.units)) if reads else 0
        return own if own and self._has_head(self._loss(index, start, stop)) else 0

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

    def _recomputation(self, unit: int, last: bool, shared: bool = False) -> Recomputation:
        return self.recipe.recomputation(self.units[unit].name, last, shared)

    def _shape(self, position: int) -> tuple[int, ...]:
        return self.units[position - 1].shape if position else self.units.input_size

    def _representative(self, position: int) -> int:
        if position in (0, len(self.units)):
            return position
        return next(p for p in range(1, position + 1) if self._shape(p) == self._shape(position))
