"""Bilinear interpolation and average pooling as products with two small matrices, one for each axis.

The backward of a product is a product, and keeps nothing but the matrices. On CUDA the backward of torch's own
functions (`F.interpolate`, and `F.adaptive_avg_pool2d` where windows overlap) adds in any order, so that no step of
training could be repeated bit for bit.
"""

import torch
from torch import Tensor, nn


class Resampling(nn.Module):
    """Maps a grid of one size to one of another, each axis by itself; one of the same size stays as it is.

    The result has the type of the grid, also under autocast, and the layout of channels last in memory.

    The matrices are float64 until the module is cast, as a network's auxiliary nets are when they are built.

    Args:
        rows: (new height, height).
        columns: (new width, width).
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, rows: Tensor, columns: Tensor) -> None:
        super().__init__()
        self.same_size = rows.shape[0] == rows.shape[1] and columns.shape[0] == columns.shape[1]
        for name, matrix in {"rows": rows, "columns": columns}.items():
            self.register_buffer(name, matrix.new_empty(0) if self.same_size else matrix, persistent=False)

    def forward(self, grid: Tensor) -> Tensor:
        """Maps (batch, channels, height, width) to (batch, channels, new height, new width)."""
        if self.same_size:
            return grid
        rows, columns = self.rows.to(grid.dtype), self.columns.to(grid.dtype)
        with torch.autocast(grid.device.type, enabled=False):
            wider = torch.matmul(columns, grid.permute(0, 2, 3, 1))
            resampled = torch.matmul(rows, wider.flatten(2)).unflatten(2, wider.shape[2:])
            return resampled.permute(0, 3, 1, 2)


def interpolation(
    size: tuple[int, int], new_size: tuple[int, int], align_corners: bool = False, device: torch.device | None = None
) -> Resampling:
    """What `F.interpolate(mode="bilinear")` computes, from a grid of `size` to one of `new_size`."""
    axes = zip(size, new_size, strict=True)
    return Resampling(*(_interpolating(old, new, align_corners, device) for old, new in axes))


def average_pooling(size: tuple[int, int], new_size: tuple[int, int], device: torch.device | None = None) -> Resampling:
    """What `F.adaptive_avg_pool2d` computes, from a grid of `size` to one of `new_size`."""
    return Resampling(*(_averaging(old, new, device) for old, new in zip(size, new_size, strict=True)))


def _interpolating(old: int, new: int, align_corners: bool, device: torch.device | None) -> Tensor:
    """(new, old) weights: each new place lies between two old ones, and weighs both by how near they are."""
    places = torch.arange(new, device=device, dtype=torch.float64)
    places = places * ((old - 1) / max(new - 1, 1)) if align_corners else (places + 0.5) * (old / new) - 0.5
    distances = places.clamp(0, old - 1)[:, None] - torch.arange(old, device=device, dtype=torch.float64)
    return (1 - distances.abs()).clamp(min=0)


def _averaging(old: int, new: int, device: torch.device | None) -> Tensor:
    """(new, old) weights: window i has the old places from floor(i * old / new) to ceil((i + 1) * old / new)."""
    windows, places = torch.arange(new, device=device)[:, None], torch.arange(old, device=device)
    inside = (places >= windows * old // new) & (places < -(-(windows + 1) * old // new))
    return inside / inside.sum(1, keepdim=True).double()
