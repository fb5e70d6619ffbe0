"""The kinetic energy of a block: how far it moves its input.

Source: Karkar et al., Module-wise Training of Neural Networks via the Minimizing Movement Scheme (TRGL), NeurIPS 2023,
arXiv 2309.17357. The features of a residual network move like particles, one step a block. A network whose blocks are
penalised for long steps keeps more of what later modules need.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_PARTS = 4


class _Energy(torch.autograd.Function):
    """The mean squared difference of two tensors that are kept anyway; nothing else of it is kept."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, features: Tensor) -> Tensor:
        ctx.save_for_backward(output, features)
        # In float32: squares of half-precision features lose most of their digits. In parts: the float32 copy never
        # exists as a whole.
        total, size = output.new_zeros((), dtype=torch.float32), -(-len(output) // _PARTS)
        for after, before in zip(output.split(size), features.split(size), strict=True):
            total += after.to(torch.float32, copy=True).sub_(before).square_().sum()
        return total / output.numel()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        output, features = ctx.saved_tensors
        to_output, to_features = ctx.needs_input_grad
        own = (output - features).mul_(gradient * 2 / output.numel())
        # A second tensor only where both need a gradient: autograd adds to either of them in place.
        back = (own.neg() if to_output else own.neg_()).to(features.dtype) if to_features else None
        return own.to(output.dtype) if to_output else None, back


def kinetic_weight(weight: float, index: int, count: int) -> float:
    """The weight of the term in a module: as the source halves tau in the first half, it is halved in the second.

    Args:
        weight: of the first module.
        index: which module, from 0.
        count: number of modules; the only one is in the first half.
    """
    return weight if 2 * index < count else weight / 2


def kinetic_energy(output: Tensor, features: Tensor) -> Tensor:
    """The mean of (output - features)^2, computed in float32: TRGL's term for a block.

    It keeps references to both tensors for backward, which a block and what follows it mostly keep anyway, and nothing
    else. (Not kept anyway is what the next block takes in another type, as a layer norm of bfloat16 on CUDA does, and
    what a downsampling takes in another order.) In backward the gradient of the input waits while the block's backward
    runs: that is one feature map more at the peak. The source's term is the mean square of each residual branch; a
    block with two branches is one step here.

    Args:
        output: (B, ...) what a block gives.
        features: (B, ...) what it was given, of the same shape.

    Returns:
        A scalar in float32. Its gradients have the types of the two tensors.
    """
    return _Energy.apply(output, features)
