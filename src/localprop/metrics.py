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


@torch.no_grad()
def evaluate(
    predict: Callable[[Tensor], Sequence[Tensor | None]],
    batches: Iterable[tuple[Tensor, Tensor]],
    after_batch: Callable[[], None] = lambda: None,
) -> Scores:
    """Evaluates logits on labelled images.

    Args:
        predict: gives for a batch of images the logits (B, C) of every head, the network's last.
        batches: (images, labels (B,)).
        after_batch: called after each batch.
    """
    correct: list[int | None] = []
    top5, loss, count, classes = 0, 0.0, 0, 0
    for images, labels in batches:
        logits = predict(images)
        correct = correct or [None if predicted is None else 0 for predicted in logits]
        for k, predicted in enumerate(logits):
            if predicted is not None:
                correct[k] = (correct[k] or 0) + int((predicted.argmax(1) == labels).sum())
        final = logits[-1]
        assert final is not None  # the network itself always has logits
        classes = final.shape[1]
        loss += F.cross_entropy(final.float(), labels, reduction="sum").item()
        top5 += int((final.topk(min(5, classes)).indices == labels[:, None]).sum())
        count += len(labels)
        after_batch()
    top1 = tuple(None if hits is None else 100 * hits / count for hits in correct)
    return Scores(top1, 100 * top5 / count if classes > 5 else None, loss / count, count)
