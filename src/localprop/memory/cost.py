"""What units and local losses cost in a training step, found by running them on fake tensors: no data, no GPU."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from localprop.errors import batch_norm_told
from localprop.features import Example
from localprop.memory.part import Conditions, Cost, part_cost
from localprop.tracing.copies import fake_copy
from localprop.tracing.units import Chain


def module_peak(units: Sequence[Cost], auxiliary: Cost) -> int:
    """Largest number of bytes that a module needs at any moment of its step, beside its input.

    Args:
        units: costs of its units, in order.
        auxiliary: cost of its local loss.
    """
    # Of each output, whether it is kept: for the unit itself, or for what follows.
    kept = [unit.keeps_output or after is None or after.keeps_input for unit, after in pairwise([*units, None]) if unit]
    peak = alive = 0  # alive: kept by the units before
    before = []
    for i, unit in enumerate(units):
        before.append(alive)
        given = 0 if i == 0 or kept[i - 1] else units[i - 1].output
        peak = max(peak, alive + given + unit.forward)
        alive += unit.kept + (unit.output if kept[i] else 0)
    peak = max(peak, alive + auxiliary.forward, alive + auxiliary.backward)
    gradients, output = auxiliary.gradients, units[-1].output  # which is the next module's input
    for i in reversed(range(len(units))):
        own = units[i].output if units[i].keeps_output and i + 1 < len(units) else 0
        peak = max(peak, before[i] + units[i].backward + own + gradients + output)
        gradients += units[i].gradients
    return peak


def unit_costs(model: nn.Module, chain: Chain, conditions: Conditions) -> list[Cost]:
    """The cost of each unit of a chain, in train mode."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    duplicate = fake_copy(model, mode).train()
    dtype = next((p.dtype for p in duplicate.parameters() if p.is_floating_point()), torch.float32)
    with mode:
        features = torch.empty(conditions.batch_size, *chain.input_size, dtype=dtype)
    context: dict[str, Any] = {}
    costs = []
    for unit in chain:
        parameters = [duplicate.get_parameter(name) for name in unit.parameters]

        def run(x: Tensor, unit: Any = unit) -> Tensor:
            return unit(duplicate, x, context, conditions.recomputation == "whole")

        with batch_norm_told(f"unit {unit.name}", conditions.batch_size):
            cost, features = part_cost(mode, run, features, parameters, conditions)
        costs.append(cost)
    return costs


def auxiliary_cost(
    auxiliary: nn.Module,
    output: tuple[int, ...],
    source: tuple[int, ...],
    network_input: tuple[int, ...],
    target: Example,
    conditions: Conditions,
) -> Cost:
    """The cost of a local loss.

    Args:
        auxiliary: the local loss.
        output: shape of the module's output, batch axis left out, as in the next two.
        source: shape of its input.
        network_input: shape of the network's input.
        target: what one target looks like.
        conditions: of the step.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    duplicate = fake_copy(auxiliary, mode).train()
    batch = conditions.batch_size
    half = conditions.amp_dtype
    with mode:
        features = torch.empty(batch, *output, dtype=half)
        own = torch.empty(batch, *source, dtype=half)
        inputs = torch.empty(batch, *network_input) if auxiliary.uses_inputs else None
        targets = target.batch(batch)

    def run(x: Tensor) -> Tensor:
        return duplicate(x, own, inputs, targets)[0]

    with batch_norm_told("an auxiliary net", batch):
        return part_cost(mode, run, features, duplicate.parameters(), conditions)[0]


class Costs:
    """The costs of a model's units, and of local losses on them, each found once.

    Args:
        model: the backbone.
        chain: its units.
    """

    def __init__(self, model: nn.Module, chain: Chain) -> None:
        self.model, self.chain = model, chain
        self._units: dict[Conditions, list[Cost]] = {}
        self._auxiliaries: dict[Any, Cost] = {}

    def units(self, conditions: Conditions) -> list[Cost]:
        """See `unit_costs`."""
        if conditions not in self._units:
            self._units[conditions] = unit_costs(self.model, self.chain, conditions)
        return self._units[conditions]

    def auxiliary(
        self,
        loss: nn.Module,
        output: tuple[int, ...],
        source: tuple[int, ...],
        target: Example,
        conditions: Conditions,
    ) -> Cost:
        """See `auxiliary_cost`. Losses whose nets look the same cost the same."""
        key = (type(loss), repr(loss), output, source, target, conditions)
        if key not in self._auxiliaries:
            self._auxiliaries[key] = auxiliary_cost(loss, output, source, self.chain.input_size, target, conditions)
        return self._auxiliaries[key]
