"""Layouts of feature maps: which axis of a unit's output holds channels, rows, columns or tokens.

Heads and decoders work on two views of a feature map, whatever its layout:

- the *grid*, (batch, channels, height, width), without prefix tokens such as the class token;
- the *tokens*, (batch, length, channels), prefix tokens included.

Both are views where the layout allows it, never copies for their own sake.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from localprop.errors import ChainError


@dataclass(frozen=True)
class Example:
    """Shape and type of one input, or of one target, without the batch axis.

    Attributes:
        shape: such as (3, 224, 224) for an image, (128,) for tokens, () for a label.
        dtype: its type; None stands for the model's floating point type.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None

    def batch(self, size: int, floating: torch.dtype = torch.float32) -> Tensor:
        """A batch of zeros: 0 is a valid label, and a valid token of any vocabulary.

        Args:
            size: examples in it.
            floating: the model's floating point type.
        """
        return torch.zeros(size, *self.shape, dtype=self.dtype or floating)


@dataclass(frozen=True)
class Layout:
    """The layout of one feature map, batch axis left out.

    Args:
        kind: "NCHW", "NHWC", "NLC" (tokens; the axes between batch and channels are flattened into one
            length) or "NC" (a vector per image).
        channels: size of the channel axis.
        height, width: size of the grid in feature positions; 1 x 1 for "NC". For "NLC" it is the grid that
            the tokens after the prefix fill row by row. (Models that keep tokens in another order, such as
            Hiera and NesT, have a grid of the right size whose positions are permuted.)
        prefix: number of leading tokens that belong to no position, such as the class token.
    """

    kind: str
    channels: int
    height: int = 1
    width: int = 1
    prefix: int = 0

    def grid(self, features: Tensor) -> Tensor:
        """The positions of `features` as (batch, channels, height, width); prefix tokens are left out."""
        if self.kind == "NCHW":
            return features
        if self.kind == "NHWC":
            return features.permute(0, 3, 1, 2)
        patches = self.tokens(features)[:, self.prefix :]
        return patches.transpose(1, 2).unflatten(2, (self.height, self.width))

    def tokens(self, features: Tensor) -> Tensor:
        """All positions of `features`, prefix tokens first, as (batch, length, channels)."""
        if self.kind == "NCHW":
            return features.flatten(2).transpose(1, 2)
        if self.kind == "NC":
            return features.unsqueeze(1)
        return features.flatten(1, -2)

    def pooled(self, features: Tensor) -> Tensor:
        """One vector per image, (batch, channels): the mean over positions.

        With prefix tokens, the mean of that and of the prefix tokens' mean: the class token is what the
        backbone's own classifier will read, so a head must reach it with more than one token's share of the
        gradient.
        """
        tokens = self.tokens(features)
        patches = tokens[:, self.prefix :].mean(1)
        return (patches + tokens[:, : self.prefix].mean(1)) / 2 if self.prefix else patches


def image_layout(input_size: tuple[int, int, int]) -> Layout:
    """The layout of an image batch of `input_size` (channels, height, width)."""
    channels, height, width = input_size
    return Layout("NCHW", channels, height, width)


def infer_layout(
    shape: tuple[int, ...],
    input_size: tuple[int, int, int],
    prefix: int | None = None,
    hint: str | None = None,
) -> Layout:
    """Infers the layout of a feature map from its shape alone.

    Args:
        shape: (batch, ...) of the feature map.
        input_size: (channels, height, width) of the image it comes from; a grid keeps its aspect ratio.
        prefix: number of prefix tokens, where the backbone tells it; else the smallest that leaves a grid.
        hint: "NCHW" or "NHWC", used where the shape allows both; else the one nearer to the image's aspect.

    Raises:
        ChainError: the shape has no axis for channels.
    """
    if len(shape) < 2:
        raise ChainError(f"a feature map of shape {shape} has no channel axis; expected (batch, ..., channels)")
    if len(shape) == 2:
        return Layout("NC", shape[1])
    if len(shape) == 4:
        errors = {"NCHW": _aspect_error(shape[2:], input_size), "NHWC": _aspect_error(shape[1:3], input_size)}
        fitting = [kind for kind in errors if errors[kind] <= _tolerance(input_size)]
        if fitting:
            kind = hint if hint in fitting else min(fitting, key=lambda kind: errors[kind])
            return Layout("NCHW", *shape[1:]) if kind == "NCHW" else Layout("NHWC", shape[3], *shape[1:3])
    length = math.prod(shape[1:-1])
    # A prefix known for the whole backbone may not be there yet (or any more) at this unit: try it, then
    # none; and for either a grid of exactly the image's aspect before a rounded one.
    likely = dict.fromkeys([prefix or 0, 0])
    attempts = [(candidate, tolerance) for tolerance in (0, _tolerance(input_size)) for candidate in likely]
    attempts += [(candidate, _tolerance(input_size)) for candidate in range(1, min(length, 17))]
    for candidate, tolerance in attempts:
        if grid := _grid_of(length - candidate, input_size, tolerance):
            return Layout("NLC", shape[-1], *grid, candidate)
    return Layout("NLC", shape[-1], 1, length)


def _aspect_error(grid: tuple[int, ...], input_size: tuple[int, int, int]) -> int:
    return abs(grid[0] * input_size[2] - grid[1] * input_size[1])


def _tolerance(input_size: tuple[int, int, int]) -> int:
    # Rounding at each downsampling moves a side by at most one position, and equal sides equally.
    return 0 if input_size[1] == input_size[2] else max(input_size[1:])


def _grid_of(length: int, input_size: tuple[int, int, int], tolerance: int) -> tuple[int, int] | None:
    if length < 1:
        return None
    height = round((length * input_size[1] / input_size[2]) ** 0.5)
    for candidate in (height, height + 1, height - 1):
        if candidate > 0 and length % candidate == 0:
            grid = (candidate, length // candidate)
            if _aspect_error(grid, input_size) <= tolerance:
                return grid
    return None
