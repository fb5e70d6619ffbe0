"""Random positions of a grid, and the patches there."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def random_positions(batch: int, length: int, count: int, device: torch.device) -> Tensor:
    """Draws `count` of `length` positions for each example, without repetition: (batch, count) integers.

    The sizes are fixed and no value is read, so that a CUDA graph can capture it. The numbers come from torch's global
    generator of the device, which `LocalNetwork.backward` seeds for each module.
    """
    return torch.rand(batch, length, device=device).argsort(1)[:, :count]


def select(grid: Tensor, positions: Tensor, patch: int = 1) -> Tensor:
    """The patches of a grid at some positions, one below the other.

    Args:
        grid: (batch, channels, height * patch, width * patch).
        positions: (batch, count), each between 0 and height * width, row by row; no position twice.
        patch: side of the patch that belongs to a position.

    Returns:
        (batch, channels, count * patch, patch).
    """
    patches = _Selection.apply(grid, positions, patch)
    return patches.permute(0, 2, 1, 3, 4).flatten(2, 3)


class _Selection(torch.autograd.Function):
    """Indexing whose backward writes each gradient to its place.

    torch's own backward of an index adds, because it cannot know that no position occurs twice. On CUDA it sorts first.
    """

    @staticmethod
    def forward(ctx: Any, grid: Tensor, positions: Tensor, patch: int) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.shape, ctx.patch = grid.shape, patch
        return _patches(grid, patch)[_index(positions, grid.shape[3] // patch)]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (positions,) = ctx.saved_tensors
        batch, channels, height, width = ctx.shape
        # In the layout of channels last, as grids of tokens have it.
        grid = gradient.new_zeros(batch, height, width, channels).permute(0, 3, 1, 2)
        _patches(grid, ctx.patch)[_index(positions, width // ctx.patch)] = gradient
        return grid, None, None


def _patches(grid: Tensor, patch: int) -> Tensor:
    """A view of a grid as (batch, channels, rows, patch, columns, patch)."""
    return grid.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))


def _index(positions: Tensor, columns: int) -> tuple[Any, ...]:
    """What selects (batch, count, channels, patch, patch) of patches."""
    images = torch.arange(len(positions), device=positions.device)[:, None]
    everything = slice(None)
    return images, everything, positions // columns, everything, positions % columns
