"""Feature reconstruction: each module predicts the label and rebuilds its own input features.

Source: Local Learning on Transformers via Feature Reconstruction, arXiv 2212.14215. What a module receives, it must
be able to rebuild from what it gives: so little of the information that later modules need is lost on the way. The
first module's input is the image. The paper's loss weights are not published.
"""

import math
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from localprop.decoders.common import Decoder
from localprop.errors import ConfigError
from localprop.grids.positions import random_positions, select
from localprop.methods.common import Ends, TaskTerm, by_depth, contrasts, require_a_term
from localprop.network.loss import ModuleSpec

_PARTS = 4


class FeatureReconstruction(TaskTerm):
    """task x criterion of the head's prediction + weight x reconstruction x mean squared error of the rebuilt input.

    `task` and `reconstruction` go linearly from the first module to the last but one. A term of weight 0 is left out,
    with its net.

    Args:
        spec: the module it is built for.
        weight: weight of the reconstruction.
        normalize: whether each position of the target features is normalised over channels (mean 0, variance 1),
            as masked autoencoders do with patches. Without it the error grows with the features' scale, which a
            module can lower by shrinking its output. The image is a target as it is.
        sample: part of the positions that is rebuilt, above 0 and at most 1: other random positions of each image in
            each step. Masked autoencoders (arXiv 2111.06377) learn from a part of the patches, too. It needs a decoder
            that rebuilds single positions (pixel-shuffle). Where the target's size is no whole multiple of the
            output's, a module rebuilds all positions.
        reconstruction: (first, last) factor of the reconstruction's weight.
        task: (first, last) weight of the criterion on the head's prediction.
        contrast: of how many modules, from the first, the criterion is supervised contrast.
        temperature: of the contrast.

    Raises:
        ConfigError: `sample` is not such a part, the decoder rebuilds the grid as a whole, or both terms are 0.
    """

    defaults = MappingProxyType({"reach": 1})

    def __init__(
        self,
        spec: ModuleSpec,
        weight: float = 1.0,
        normalize: bool = True,
        sample: float = 1.0,
        reconstruction: Ends = (1.0, 1.0),
        task: Ends = (1.0, 1.0),
        contrast: int = 0,
        temperature: float = 0.07,
    ) -> None:
        super().__init__(spec, by_depth(task, spec, "task"), contrasts(contrast, spec), temperature)
        self.weight = weight * by_depth(reconstruction, spec, "reconstruction")
        require_a_term(spec, reconstruction=self.weight, task=self.task_weight)
        self.target = spec.input
        self.normalize = normalize and spec.index > 0
        self.decoder = spec.build_decoder(spec.input) if self.weight else None
        self.sampled = _sampled(self.decoder, sample, spec.decoder) if self.decoder else None

    def rest(self, output: Tensor, features: Tensor, inputs: Tensor | None, targets: Tensor) -> Tensor | None:
        """The weighted error of the rebuilt input; see `HeadLoss.rest`."""
        if self.decoder is None:
            return None
        rebuilt, target = self._rebuilt(self.decoder, output, self.target.grid(features))
        return self.weight * reconstruction_error(rebuilt, target, self.normalize)

    def _rebuilt(self, decoder: Decoder, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """What the decoder rebuilds, and the part of the target that it is."""
        if not self.sampled:
            return decoder(output), target
        height, width = decoder.size
        positions = random_positions(len(output), height * width, self.sampled, output.device)
        return decoder(output, positions), select(target, positions, decoder.patch or 1)


def _sampled(decoder: Decoder, sample: float, name: str) -> int | None:
    """The number of positions that are rebuilt; None for all."""
    if not 0 < sample <= 1:
        raise ConfigError(f"feature-reconstruction: sample is {sample:g}; it must be above 0 and at most 1")
    if sample == 1:
        return None
    if not getattr(decoder, "single_positions", False):  # which a plugin's may lack
        raise ConfigError(
            f"feature-reconstruction: sample is {sample:g}, but decoder {name} rebuilds the grid as a whole; choose "
            "decoder pixel-shuffle, or sample=1"
        )
    length = math.prod(decoder.size)
    count = max(round(sample * length), 1)
    return count if count < length and decoder.patch else None


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
