"""What units and local losses cost in a training step, found by running them on fake tensors: no data, no GPU."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from localprop.errors import batch_norm_told
from localprop.features import Example
from localprop.memory.part import Conditions, Cost, part_cost
from localprop.memory.slices import hands_mixed, run, why_not_sliced
from localprop.settings.recipe import runs_again
from localprop.tracing.blocks import has_adapters
from localprop.tracing.copies import fake_copy
from localprop.tracing.units import Chain

Part = Literal["whole", "judge", "rest"]
"""Of a local loss: all of it, the head's term, or all else."""


class Reach(NamedTuple):
    """What the head of a module reads ahead.

    Attributes:
        units: costs of the next module's first units, each under conditions that are `ahead`.
        head: cost of the head's term.
    """

    units: Sequence[Cost]
    head: Cost


class End(NamedTuple):
    """What comes after the forward of a module's last unit, in bytes beside what its units keep.

    Attributes:
        top: most in use until the backward of its units begins.
        waiting: in use in the backward of each of its units.
        given: in use in the forward of each of its units.
        seconds: expected time of all that comes then.
    """

    top: int
    waiting: int
    given: int = 0
    seconds: float = 0.0


def module_end(auxiliary: Cost, output: int, reach: Reach | None = None) -> End:
    """What comes after the forward of a local module's last unit.

    Args:
        auxiliary: cost of its local loss; of the rest of it, if its head reads ahead.
        output: bytes of its output, which is the next module's input.
        reach: what its own head reads ahead, if that does.
    """
    top, gradients, seconds = max(auxiliary.forward, auxiliary.backward), auxiliary.gradients, auxiliary.seconds
    if not reach:
        return End(top, gradients + output, seconds=seconds)
    # The rest has left the gradient of the output, if it reads that.
    waiting = gradients + (output if auxiliary.backward >= output else 0)
    tops, kept = _forward(reach.units)
    top = max(top, *(waiting + own for own in tops), waiting + kept[-1] + max(reach.head.forward, reach.head.backward))
    gradients += reach.head.gradients
    waiting += reach.head.gradients + kept[-1]
    top = max(top, *(waiting + unit.backward - unit.kept for unit in reach.units))
    seconds += sum(part.seconds for part in (*reach.units, reach.head))
    return End(top, gradients + output + kept[-1], seconds=seconds)


def module_peak(units: Sequence[Cost], end: End, shared: int = 0) -> int:
    """Largest number of bytes that a module needs at any moment of its step, beside its input.

    Args:
        units: costs of its units, in order.
        end: what comes after the forward of the last.
        shared: how many of its first units the head of the module before has read: they have run when its step begins.
    """
    tops, before = _forward(units)
    peak, waiting = max([*(end.given + top for top in tops[shared:]), before[-1] + end.top]), end.waiting
    for i in reversed(range(len(units))):
        own = units[i].output if units[i].keeps_output and i + 1 < len(units) else 0
        peak = max(peak, before[i] + units[i].backward + own + waiting)
        waiting += units[i].gradients
    return peak


def _forward(units: Sequence[Cost]) -> tuple[list[int], list[int]]:
    """Bytes in use at most in the forward of each unit, and kept before each; then those kept after the last."""
    # Of each output, whether it is kept: for the unit itself, or for what follows.
    kept = [unit.keeps_output or after is None or after.keeps_input for unit, after in pairwise([*units, None]) if unit]
    tops, before = [], [0]
    for i, unit in enumerate(units):
        given = 0 if i == 0 or kept[i - 1] else units[i - 1].output
        tops.append(before[i] + given + unit.forward)
        before.append(before[i] + unit.kept + (unit.output if kept[i] else 0))
    return tops, before


class _Units:
    """The units of a model on fake tensors, each with what it is given under some conditions, in train mode.

    Args:
        model: the backbone.
        chain: its units.
        conditions: under which each of them runs once.

    Attributes:
        first: the costs then.
    """

    def __init__(self, model: nn.Module, chain: Chain, conditions: Conditions) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._model, self._chain = fake_copy(model, self._mode).train(), chain
        for i in conditions.frozen:
            chain[i].freeze(self._model)
        for i in range(len(chain)) if has_adapters(model) else conditions.frozen:
            chain[i].rest(self._model)
        self._context: dict[str, Any] = {}
        dtype = next((p.dtype for p in self._model.parameters() if p.is_floating_point()), torch.float32)
        with self._mode:
            self._sources = [torch.empty(conditions.batch_size, *chain.input_size, dtype=dtype)]
        self.first: list[Cost] = []
        for i in range(len(chain)):
            cost, output = self._run(i, conditions)
            self.first.append(cost)
            self._sources.append(output)

    def cost(self, i: int, conditions: Conditions) -> Cost:
        """The cost of unit i under conditions that differ from the first in what does not change its input."""
        return self._run(i, conditions)[0]

    def _run(self, i: int, conditions: Conditions) -> tuple[Cost, Tensor]:
        unit, again = self._chain[i], conditions.recomputation
        if runs_again(again) > 1 and hands_mixed(unit):
            again = "whole"  # all that such a unit may have; see `Costs.unsliced`
        parameters = [self._model.get_parameter(name) for name in unit.parameters]
        for parameter in parameters:
            parameter.grad = None

        def forward(x: Tensor) -> Tensor:
            return run(unit, self._model, x, self._context, again)

        with batch_norm_told(f"unit {unit.name}", conditions.batch_size):
            return part_cost(self._mode, forward, self._sources[i], parameters, conditions)


def unit_costs(model: nn.Module, chain: Chain, conditions: Conditions) -> list[Cost]:
    """The cost of each unit of a chain, in train mode."""
    return _Units(model, chain, conditions).first


def auxiliary_cost(
    auxiliary: nn.Module,
    output: tuple[int, ...],
    source: tuple[int, ...],
    network_input: tuple[int, ...],
    target: Example,
    conditions: Conditions,
    part: Part = "whole",
) -> Cost:
    """The cost of a local loss, or of a part of it.

    Args:
        auxiliary: the local loss.
        output: shape of the module's output, or of what the head reads; batch axis left out, as in the next two.
        source: shape of its input.
        network_input: shape of the network's input.
        target: what one target looks like.
        conditions: of the step.
        part: "judge" or "rest", of a `HeadLoss`.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    duplicate: Any = fake_copy(auxiliary, mode).train()
    batch = conditions.batch_size
    half = conditions.amp_dtype
    with mode:
        features = torch.empty(batch, *output, dtype=half)
        own = torch.empty(batch, *source, dtype=half)
        inputs = torch.empty(batch, *network_input) if auxiliary.uses_inputs else None
        targets = target.batch(batch)

    def run(x: Tensor) -> Tensor:
        if part == "whole":
            return duplicate(x, own, inputs, targets)[0]
        term = duplicate.judge(x, targets)[0] if part == "judge" else duplicate.rest(x, own, inputs, targets)
        return x.new_zeros(()) if term is None else term

    trained = list(duplicate.parameters())
    if part != "whole":
        heads = {id(parameter) for parameter in duplicate.head_parameters()}
        trained = [parameter for parameter in trained if (id(parameter) in heads) == (part == "judge")]
    with batch_norm_told("an auxiliary net", batch):
        return part_cost(mode, run, features, trained, conditions)[0]


class Costs:
    """The costs of a model's units, and of local losses on them, each found once.

    Args:
        model: the backbone.
        chain: its units.
    """

    def __init__(self, model: nn.Module, chain: Chain) -> None:
        self.model, self.chain = model, chain
        self._passes: dict[tuple[Any, ...], _Units] = {}  # by what the units are given
        self._units: dict[tuple[int, Conditions], Cost] = {}
        self._auxiliaries: dict[Any, Cost] = {}
        self._unsliced: dict[int, str | None] = {}

    def units(self, conditions: Conditions) -> list[Cost]:
        """The cost of each unit."""
        return [self.unit(i, conditions) for i in range(len(self.chain))]

    def unit(self, i: int, conditions: Conditions) -> Cost:
        """The cost of unit i."""
        if (i, conditions) not in self._units:
            given = conditions.batch_size, conditions.amp_dtype, conditions.device, conditions.frozen
            if given not in self._passes:
                self._passes[given] = _Units(self.model, self.chain, replace(conditions, recomputation="none"))
            self._units[i, conditions] = self._passes[given].cost(i, conditions)
        return self._units[i, conditions]

    def unsliced(self, unit: int) -> str | None:
        """Why a unit cannot run in slices of the batch; None if it can. See `why_not_sliced`."""
        if unit not in self._unsliced:
            self._unsliced[unit] = why_not_sliced(self.model, self.chain, unit)
        return self._unsliced[unit]

    def auxiliary(
        self,
        loss: nn.Module,
        output: tuple[int, ...],
        source: tuple[int, ...],
        target: Example,
        conditions: Conditions,
        part: Part = "whole",
    ) -> Cost:
        """See `auxiliary_cost`. Losses whose nets look the same cost the same."""
        key = (type(loss), repr(loss), output, source, target, conditions, part)
        if key not in self._auxiliaries:
            size = self.chain.input_size
            self._auxiliaries[key] = auxiliary_cost(loss, output, source, size, target, conditions, part)
        return self._auxiliaries[key]
