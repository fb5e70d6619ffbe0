"""Accuracy and loss over a dataset."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Scores:
    """What an evaluation found.

    Attributes:
        top1: accuracy in percent of each set of logits, None where there were none; the last is the network's.
        top5: of the network, in percent; None below 6 classes, where it has no meaning.
        loss: mean cross-entropy of the network.
        images: number of images.
    """

    top1: tuple[float | None, ...]
    top5: float | None
    loss: float
    images: int


@dataclass
class Tally:
    """Counts what was right, batch by batch."""

    correct: tuple[int | None, ...] = ()
    top5: int = 0
    loss: float = 0.0
    images: int = 0
    classes: int = 0

    def add(self, hits: Sequence[int | None], logits: Tensor, labels: Tensor) -> None:
        """Takes in a batch.

        Args:
            hits: what `count_hits` gave for the logits of every head, the network's last.
            logits: (B, C) of the network.
            labels: (B,).
        """
        before = self.correct or (0,) * len(hits)
        self.correct = tuple(None if n is None else (b or 0) + n for b, n in zip(before, hits, strict=True))
        self.classes = logits.shape[1]
        self.loss += F.cross_entropy(logits.float(), labels, reduction="sum").item()
        self.top5 += int((logits.topk(min(5, self.classes)).indices == labels[:, None]).sum())
        self.images += len(labels)

    def scores(self) -> Scores:
        """What was found in all."""
        top1 = tuple(None if hits is None else 100 * hits / self.images for hits in self.correct)
        top5 = 100 * self.top5 / self.images if self.classes > 5 else None
        return Scores(top1, top5, self.loss / self.images, self.images)


def count_hits(logits: Tensor | None, labels: Tensor) -> int | None:
    """How many of (B, C) logits are highest at their labels (B,); None without logits."""
    return None if logits is None else int((logits.argmax(1) == labels).sum())


@torch.no_grad()
def evaluate(predict: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]) -> Scores:
    """Evaluates a model on labelled images.

    Args:
        predict: gives for a batch of images the logits (B, C).
        batches: (images, labels (B,)).
    """
    tally = Tally()
    for images, labels in batches:
        logits = predict(images)
        tally.add([count_hits(logits, labels)], logits, labels)
    return tally.scores()
