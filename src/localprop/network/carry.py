"""A batch, or a part of one, on its way through the modules."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from localprop.errors import warn_renamed
from localprop.network.resting import Away, Resting
from localprop.tasks.base import Batch


@dataclass
class Pending:
    """A module that waits for the gradient of the head that reads ahead.

    Attributes:
        output: the module's output, with its graph.
        gradient: that of all other terms that read the output; None where there are none.
        energy: what else of its loss has a graph; see `LocalModule.kinetic`.
    """

    output: Tensor
    gradient: Tensor | None
    energy: Tensor | None


@dataclass
class Carry:
    """A batch on its way through the modules: what one of them hands to the next. It holds the only references.

    Attributes:
        features: (B, ...) what the next module takes, detached: the inputs before the first, the prediction after the
            last.
        targets: (B, ...) as the task has them; of classification (B,) integers, or (B, C) probabilities.
        inputs: (B, ...) the network's inputs for losses that look at them; None once no later module's does.
        context: what units hand along beside the features; see `Unit`.
        losses: the local loss of each module so far, detached.
        sums: in an evaluation, the task's sums of each module's prediction so far; None where it has no head.
        share: how much more than an equal part of the step its loss counts; None is 1. See `share_of_step`.
        stop: number of the signal that ends the run after this batch; 0 without one.
        ahead: what the next module's first units have made of the features, with its graph: the head before has read
            it, and the next module goes on from it. Like all that follows, it stays in the process.
        energies: what else of the next module's loss has a graph by then.
        pending: a module whose backward is to come.
        gradient: that of the head's loss by the features; in exact training that of the loss by the output of the
            module that is next.
        scale: the loss scale of `gradient`; None without.
        boundaries: in exact training what each module so far has taken, from which it runs again; None where it does
            not. A boundary with anything to train before it requires a gradient, and so do the features.
        away: sends such a boundary to the host, where boundaries rest there.
    """

    features: Tensor
    targets: Tensor
    inputs: Tensor | None = None
    context: dict[str, Any] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)
    sums: list[Tensor | None] = field(default_factory=list)
    share: Tensor | None = None
    stop: int = 0
    ahead: Tensor | None = None
    energies: list[Tensor] = field(default_factory=list)
    pending: Pending | None = None
    gradient: Tensor | None = None
    scale: Tensor | None = None
    boundaries: list[Tensor | Resting | None] = field(default_factory=list)
    away: Away | None = None

    @classmethod
    def of(cls, batch: "Batch | Carry") -> "Carry":
        """A batch [inputs, targets], which is taken out of its list, before the first module."""
        if isinstance(batch, Carry):
            return batch
        inputs = batch.pop(0)
        return cls(inputs, batch.pop(), inputs)

    @classmethod
    def micro_batches(
        cls, batch: Batch, count: int, share: Callable[[Tensor], Tensor | None] = lambda targets: None
    ) -> "Iterator[Carry]":
        """Equal parts of a batch [inputs, targets], each a copy; the batch is taken out of its list with the last one.

        The only part is the batch itself, as `of` gives it.

        Args:
            batch: the batch.
            count: how many parts.
            share: gives for the targets of a part its `Carry.share`.
        """
        for number in range(count):
            part = batch if count == 1 else [tensor.chunk(count)[number].clone() for tensor in batch]
            if number + 1 == count > 1:
                batch.clear()
            carry = cls.of(part)
            carry.share = share(carry.targets)
            yield carry

    def take(self) -> Tensor:
        """What the next module goes on from."""
        ahead, self.ahead = self.ahead, None
        return self.features if ahead is None else ahead

    def clone(self) -> "Carry":
        """The same with features, inputs, targets and a list of losses of its own."""
        features = self.features.clone()
        inputs = features if self.inputs is self.features else None if self.inputs is None else self.inputs.clone()
        return replace(self, features=features, inputs=inputs, targets=self.targets.clone(), losses=list(self.losses))

    @property
    def labels(self) -> Tensor:
        """Name of `targets` in version 0.1."""
        warn_renamed("Carry.labels", "Carry.targets")
        return self.targets

    @property
    def images(self) -> Tensor | None:
        """Name of `inputs` in version 0.1."""
        warn_renamed("Carry.images", "Carry.inputs")
        return self.inputs

    @property
    def hits(self) -> list[int | None]:
        """Of a classification in version 0.1: how many examples each module's head got right."""
        warn_renamed("Carry.hits", "Carry.sums")
        return [None if own is None else int(own[0]) for own in self.sums]
