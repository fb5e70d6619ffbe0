"""Feature reconstruction: each module predicts the label and rebuilds its own input features.

Source: Local Learning on Transformers via Feature Reconstruction, arXiv 2212.14215. What a module receives, it must
be able to rebuild from what it gives: so little of the information that later modules need is lost on the way. The
first module's input is the image. The paper's loss weights are not published.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from localprop.network.loss import LocalLoss, ModuleSpec

_PARTS = 4


class FeatureReconstruction(LocalLoss):
    """Criterion of the head's prediction + `weight` x mean squared error of the rebuilt input.

    Args:
        spec: the module it is built for.
        weight: weight of the reconstruction.
        normalize: whether each position of the target features is normalised over channels (mean 0, variance 1),
            as masked autoencoders do with patches. Without it the error grows with the features' scale, which a
            module can lower by shrinking its output. The image is a target as it is.
    """

    uses_inputs = False

    def __init__(self, spec: ModuleSpec, weight: float = 1.0, normalize: bool = True) -> None:
        super().__init__()
        self.task = spec.task
        self.weight = weight
        self.target = spec.input
        self.normalize = normalize and spec.index > 0
        self.head = spec.build_head()
        self.decoder = spec.build_decoder(spec.input)

    def forward(
        self, output: Tensor, features: Tensor, inputs: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `LocalLoss.forward`."""
        prediction = self.head(output)
        error = reconstruction_error(self.decoder(output), self.target.grid(features), self.normalize)
        return self.task.loss(prediction, targets) + self.weight * error, prediction

    def predict(self, output: Tensor) -> Tensor:
        """The head's prediction."""
        return self.head(output)


class _Error(torch.autograd.Function):
    """The mean squared error, keeping of it the difference alone, which becomes the gradient where it lies."""

    @staticmethod
    def forward(ctx: Any, rebuilt: Tensor, target: Tensor, normalize: bool) -> Tensor:
        # In float32: squares of half-precision features lose most of their digits. In parts: so that the float32
        # and the normalised copy of the target never exist as a whole.
        difference, total = torch.empty_like(rebuilt), rebuilt.new_zeros((), dtype=torch.float32)
        size = -(-len(rebuilt) // _PARTS)
        for part, own, expected in zip(*(t.split(size) for t in (difference, rebuilt, target)), strict=True):
            expected = expected.permute(0, 2, 3, 1).float()
            if normalize:
                expected = F.layer_norm(expected, expected.shape[-1:])
            error = own.float() - expected.permute(0, 3, 1, 2)
            total += error.square().sum()
            part.copy_(error)
        # Not saved for backward as autograd means it: it is written to there, so there is no second backward.
        ctx.difference = difference
        return total / rebuilt.numel()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        difference, ctx.difference = ctx.difference, None
        return difference.mul_(gradient * 2 / difference.numel()), None, None


def reconstruction_error(rebuilt: Tensor, target: Tensor, normalize: bool) -> Tensor:
    """The mean squared error of a rebuilt grid, in float32.

    Args:
        rebuilt: (B, C, H, W).
        target: (B, C, H, W); gets no gradient.
        normalize: whether each position of the target is normalised over channels first.
    """
    return _Error.apply(rebuilt, target, normalize)
