"""One label for each example."""

import math
from collections.abc import Callable

import torch
from timm.data import Mixup
from torch import Tensor, nn
from torch.nn import functional as F

from localprop.errors import ChainError, ConfigError
from localprop.features import Example, Layout
from localprop.heads import build_head
from localprop.report.measures import ACCURACIES
from localprop.seeding import seeded
from localprop.settings.config import DataConfig
from localprop.tasks.base import Batch, Task

Criterion = Callable[[Tensor, Tensor], Tensor]
"""(logits (B, C), labels: (B,) integers or (B, C) probabilities) -> a scalar loss."""


class Classification(Task):
    """One label for each example: logits (C,), and labels that are integers or, mixed, probabilities (C,).

    Args:
        criterion: the loss of logits; default: cross-entropy with `smoothing`.
        outputs: number of classes, C; None takes the model's.
        smoothing: label smoothing of the cross-entropy, and of mixed labels.
        mixup: alpha of mixup (arXiv 1710.09412) in training; 0 is off.
        cutmix: alpha of CutMix (arXiv 1905.04899) in training; 0 is off.
    """

    measures = ACCURACIES
    names_outputs = True

    def __init__(
        self,
        criterion: Criterion | None = None,
        outputs: int | None = None,
        *,
        smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        super().__init__()
        self.criterion, self.outputs = criterion, outputs
        self.smoothing, self.mixup, self.cutmix = smoothing, mixup, cutmix

    @classmethod
    def of(cls, settings: DataConfig, classes: list[str]) -> "Classification":
        """See `Task.of`."""
        return cls(outputs=len(classes), smoothing=settings.smoothing, mixup=settings.mixup, cutmix=settings.cutmix)

    @property
    def hard_labels(self) -> bool:
        """See `Task.hard_labels`; mixed labels are none."""
        return not self._mixes

    @property
    def _mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def check_prediction(self, prediction: tuple[int, ...], outputs: int | None) -> None:
        """See `Task.check_prediction`."""
        if len(prediction) != 1 or outputs not in (None, prediction[-1]):
            raise ChainError(
                f"the model gives an output of shape {prediction} per image, expected ({outputs or 'classes'},); "
                "build it with the right num_classes"
            )

    def check(self, batch_size: int) -> None:
        """See `Task.check`; images are mixed in pairs."""
        if self._mixes and batch_size % 2:
            raise ConfigError(
                f"--batch-size is {batch_size}; --mixup and --cutmix mix images in pairs and need an even one"
            )

    def prepare(self, batch: Batch, seed: int, training: bool) -> Batch:
        """See `Task.prepare`: mixes a training batch, whose labels become (B, C) float32, smoothed."""
        if not (training and self._mixes):
            return batch
        mix = Mixup(
            mixup_alpha=self.mixup,
            cutmix_alpha=self.cutmix,
            label_smoothing=self.smoothing,
            num_classes=self.outputs,
        )
        with seeded(seed):  # timm's Mixup draws from NumPy's global generator
            return list(mix(*batch))

    def target(self, prediction: tuple[int, ...]) -> Example:
        """See `Task.target`."""
        return Example((), torch.int64)

    def loss(self, prediction: Tensor, targets: Tensor) -> Tensor:
        """See `Task.loss`."""
        if self.criterion is not None:
            return self.criterion(prediction, targets)
        # Mixed labels are smoothed already.
        smoothing = 0.0 if targets.is_floating_point() else self.smoothing
        return F.cross_entropy(prediction, targets, label_smoothing=smoothing)

    def head(self, name: str, features: Layout, prediction: tuple[int, ...]) -> nn.Module:
        """See `Task.head`."""
        return build_head(name, features, prediction[-1])

    def sums(self, prediction: Tensor, targets: Tensor) -> Tensor:
        """See `Task.sums`: hits, hits among the five highest logits, cross-entropy, and the number of examples."""
        count, classes = prediction.shape
        hits = (prediction.argmax(1) == targets).sum()
        near = (prediction.topk(5).indices == targets[:, None]).sum() if classes > 5 else hits * math.nan
        loss = F.cross_entropy(prediction.float(), targets, reduction="sum")
        return torch.stack([number.double() for number in (hits, near, loss, hits.new_tensor(count))])

    def scores(self, sums: Tensor) -> list[float | None]:
        """See `Task.scores`; below six classes there is no top-5 accuracy."""
        hits, near, loss, count = sums.tolist()
        top5 = None if math.isnan(near) else 100 * near / count
        return [100 * hits / count, top5, loss / count]

    def for_costs(self) -> "Classification":
        """See `Task.for_costs`: a criterion of the user's may take other labels; it keeps next to nothing."""
        return Classification(outputs=self.outputs)
