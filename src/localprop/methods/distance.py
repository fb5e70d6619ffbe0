"""Distance: each module predicts the label, and stays near what it was when training began.

A module that has been trained before gives features that later modules know. A frozen copy of it reads the same input,
and the distance of the module's output from the copy's is a term of its loss.
"""

from types import MappingProxyType

import torch
from torch import Tensor

from localprop.errors import ChainError, ConfigError, first_line
from localprop.methods.common import Ends, TaskTerm, by_depth, require_a_term
from localprop.network.loss import ModuleSpec
from localprop.tracing.private import PrivateChain


class Distance(TaskTerm):
    """task x criterion of the head's prediction + weight x (squared distance from the copy's output / its square).

    The copy is in evaluation mode. It takes the memory of the module's weights, and the time of its forward.

    Args:
        spec: the module it is built for.
        weight: of the distance.
        task: (first, last) weight of the criterion: of the first module, and of the last but one.

    Raises:
        ConfigError: a weight below 0, or of 0 for the criterion, or units that do not run by themselves.
    """

    needs_units = True
    defaults = MappingProxyType({"reach": 0})

    def __init__(self, spec: ModuleSpec, weight: float = 1.0, task: Ends = (1.0, 1.0)) -> None:
        task_weight = by_depth(task, spec, "task")
        require_a_term(spec, task=task_weight)
        if weight < 0:
            raise ConfigError(f"method distance: weight is {weight:g}; it must be at least 0")
        super().__init__(spec, task_weight, contrast=False, temperature=1.0)
        self.weight = weight
        self.copy = _Copy(spec) if weight else None

    def rest(self, output: Tensor, features: Tensor, inputs: Tensor | None, targets: Tensor) -> Tensor | None:
        """The weighted distance; see `HeadLoss.rest`."""
        if self.copy is None:
            return None
        with torch.no_grad():
            before = self.copy(features).float()
            square = before.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
        return self.weight * (output.float() - before).square().sum() / square


class _Copy(PrivateChain):
    """The units of a module as they are when it is built, in evaluation mode for good."""

    def __init__(self, spec: ModuleSpec) -> None:
        place, (start, stop) = spec.place, spec.span
        assert place is not None  # every loss that is built for a module has one
        try:
            super().__init__(place.model, place.units, start, range(start, stop), place.weights or "copied")
        except (ChainError, AttributeError) as error:
            name = place.units[start].name
            raise ConfigError(
                f"method distance cannot copy the module from unit {name} on ({first_line(error)[:150]}); take greedy"
            ) from None
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "_Copy":
        """See `nn.Module.train`; it stays in evaluation mode."""
        super().train(False)
        return self
