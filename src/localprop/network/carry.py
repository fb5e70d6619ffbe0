"""A batch, or a part of one, on its way through the modules."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor


@dataclass
class Carry:
    """A batch on its way through the modules: what one of them leaves for the next. It holds the only references.

    Attributes:
        features: (B, ...) what the next module takes, detached: the images before the first, the logits after the last.
        labels: (B,) integers, or (B, C) probabilities.
        images: (B, channels, height, width) for losses that look at them; None once no later module's does.
        context: what units hand along beside the features; see `Unit`.
        losses: the local loss of each module so far, detached.
        hits: in an evaluation, how many images each module's head got right so far; None where it has none.
        stop: number of the signal that ends the run after this batch; 0 without one.
    """

    features: Tensor
    labels: Tensor
    images: Tensor | None = None
    context: dict[str, Any] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)
    hits: list[int | None] = field(default_factory=list)
    stop: int = 0

    @classmethod
    def of(cls, batch: "list[Tensor] | Carry") -> "Carry":
        """A batch [images, labels], which is taken out of its list, before the first module."""
        if isinstance(batch, Carry):
            return batch
        images = batch.pop(0)
        return cls(images, batch.pop(), images)

    @classmethod
    def micro_batches(cls, batch: list[Tensor], count: int) -> "Iterator[Carry]":
        """Equal parts of a batch [images, labels], each a copy; the batch is taken out of its list with the last one.

        The only part is the batch itself, as `of` gives it.
        """
        if count == 1:
            yield cls.of(batch)
            return
        for number in range(count):
            part = [tensor.chunk(count)[number].clone() for tensor in batch]
            if number + 1 == count:
                batch.clear()
            yield cls.of(part)

    def clone(self) -> "Carry":
        """The same with features, images and labels of its own."""
        features = self.features.clone()
        images = features if self.images is self.features else None if self.images is None else self.images.clone()
        return replace(self, features=features, labels=self.labels.clone(), images=images)
