"""A moving average that is updated on the device: its weight is a tensor there, and a mask stops it."""

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn


class AverageOnDevice:
    """Updates a moving average as `ModelEmaV3.update` does.

    Args:
        ema: the moving average.
        failed: a scalar; the average stays as it is where this is 1. See `Mask`.
    """

    def __init__(self, ema: ModelEmaV3, failed: Tensor) -> None:
        self._ema, self._failed = ema, failed
        self._weight = torch.zeros_like(failed)

    def prepare(self, step: int) -> None:
        """Sets how much the weights of this step count. The host writes it to a tensor that CUDA graphs read."""
        self._weight.fill_(1 - self._ema.get_decay(step))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Adds the model's weights and buffers to the average."""
        weight = self._weight * (1 - self._failed)
        floats: list[tuple[Tensor, Tensor]] = []
        for own, new in zip(self._ema.module.state_dict().values(), model.state_dict().values(), strict=True):
            if own.is_meta:
                continue  # another process trains it
            if own.is_floating_point():
                floats.append((own, new))
            else:
                own.copy_(torch.where(self._failed > 0, own, new))
        by_type: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
        for own, new in floats:
            by_type.setdefault(own.dtype, []).append((own, new))
        for dtype, pairs in by_type.items():
            weights = [weight.to(dtype)] * len(pairs)
            torch._foreach_lerp_([own for own, _ in pairs], [new for _, new in pairs], weights)
