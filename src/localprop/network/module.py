"""Consecutive units of a backbone, trained by one local loss."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from localprop.features import Layout
from localprop.memory.recompute import keeping, recomputing
from localprop.network.loss import LocalLoss
from localprop.settings.recipe import Recomputation
from localprop.tracing.units import Unit


class LocalModule(nn.Module):
    """Consecutive units of a backbone, trained by one local loss.

    Attributes:
        units: names of the units.
        auxiliary: the local loss with its auxiliary nets; under this name its parameters are stored.
        output: layout of the module's output.
        recompute: whether cheap results are computed again in backward; see `localprop.memory.recompute`.
        grad_checkpointing: whether every unit but the last keeps no activations and runs again in backward. (What
            the last one keeps is needed at once, so nothing is gained by computing it twice.)
        recomputation: what each unit computes again in backward: "none", "cheap" or "whole".
        kinetic: weight of the kinetic energy of its blocks; see `localprop.network.kinetic`.
    """

    auxiliary: LocalLoss
    kinetic: float = 0.0

    def __init__(
        self,
        backbone: nn.Module,
        units: Sequence[Unit],
        local_loss: LocalLoss,
        output: Layout,
        recompute: bool = False,
        grad_checkpointing: bool = False,
        recomputation: Sequence[Recomputation] | None = None,
    ) -> None:
        super().__init__()
        # In tuples, so that the backbone is not registered a second time: its state_dict keys stay its own.
        self._backbone = (backbone,)
        self._units = tuple(units)
        self.auxiliary = local_loss  # so are its parameters called, in checkpoints too
        self.output = output
        self.recompute = recompute
        self.grad_checkpointing = grad_checkpointing
        cheap: Recomputation = "cheap" if recompute else "none"
        inner: Recomputation = "whole" if grad_checkpointing else cheap
        self.recomputation = tuple(recomputation or [*[inner] * (len(self._units) - 1), cheap])

    @property
    def local_loss(self) -> LocalLoss:
        """The local loss with its auxiliary nets."""
        return self.auxiliary

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the output, batch axis left out."""
        return self._units[-1].shape

    @property
    def units(self) -> list[str]:
        """Names of the units."""
        return [unit.name for unit in self._units]

    @property
    def buffers_used(self) -> list[str]:
        """Names of the backbone's buffers that the units use."""
        used = self._used(nn.Module.buffers)
        return [name for name, buffer in self._backbone[0].named_buffers() if id(buffer) in used]

    @property
    def frozen(self) -> bool:
        """Whether its share of the backbone has parameters, none of which is to be trained: then it only runs."""
        trained = None
        for parameter in self._each(nn.Module.parameters):
            trained = parameter.requires_grad
            if trained:
                break  # nearly always the first
        return trained is False

    def _each(self, members: Callable[[nn.Module], Iterable[Tensor]]) -> Iterator[Tensor]:
        return (tensor for unit in self._units for tensor in unit.used(self._backbone[0], members))

    def _used(self, members: Callable[[nn.Module], Iterable[Tensor]]) -> set[int]:
        return set(map(id, self._each(members)))

    @property
    def reads(self) -> set[str]:
        """Names of the context values that the units read."""
        return {name for unit in self._units for code in unit.code.values() for name in code.reads}

    def forward(self, features: Tensor, context: dict[str, Any]) -> Tensor:
        """Runs the units; `context` is what they hand along beside the features (see `Unit`)."""
        return self.run_on(self._backbone[0], features, context)

    def run_on(self, backbone: nn.Module, features: Tensor, context: dict[str, Any]) -> Tensor:
        """Runs the units on another backbone of the same make, such as a moving average of this one."""
        for unit, recomputation in zip(self._units, self.recomputation, strict=True):
            with self._remembering(recomputation):
                features = unit(backbone, features, context, recomputation == "whole")
        return features

    def _remembering(self, recomputation: Recomputation) -> AbstractContextManager[None]:
        """What autograd keeps of a unit; all units and the local loss run inside `recomputing(self.recompute)`."""
        if recomputation == "none" and self.recompute:
            return keeping()
        return recomputing() if recomputation == "cheap" and not self.recompute else nullcontext()

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the backbone exempts from weight decay; timm's optimizers ask for them."""
        exempt = getattr(self._backbone[0], "no_weight_decay", None)
        return set(exempt()) if exempt else set()

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """What this module trains: its share of the backbone, under the backbone's names, and the auxiliary net.

        Looked up at each call, so that adapters and parametrizations that were added since are among them.
        """
        prefix = f"{prefix}." if prefix else ""
        used = self._used(nn.Module.parameters)
        for name, parameter in self._backbone[0].named_parameters():
            if id(parameter) in used:
                yield prefix + name, parameter
        yield from self.auxiliary.named_parameters(f"{prefix}auxiliary", recurse, remove_duplicate)
