"""What all decoders share: the way from any layout to any target size, and the memory rule.

The rule: reduce channels first, upsample after, and keep few maps for backward. Features are read where
they lie: a 1 x 1 convolution keeps its input, which the module holds anyway. Activations are ReLU in place,
which keeps one map where GELU keeps two (its own input, and the next layer's).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localprop.features import Layout
from localprop.grids.positions import select
from localprop.grids.resampling import Resampling, average_pooling, interpolation

# A layer norm over fewer channels leaves too few degrees of freedom (over one channel, none).
MIN_WIDTH = 8
# The largest factor that a decoder learns to upsample by; the weights of a projection grow with its square.
MAX_FACTOR = 32


class Decoder(nn.Module):
    """Base of all decoders: subclasses define `decode`, from a source grid to one about `ratio` times larger.

    Where the target is smaller than the source, the grid is pooled to the target's size before anything else.
    What `decode` leaves of the way to the target's size, such as the half of a ratio of 1.5, is interpolated.

    Args:
        source: layout of the features that are read; prefix tokens are left out.
        target: layout of what is rebuilt, as a grid.

    Attributes:
        single_positions: whether `decode` treats each position by itself, so that some can be rebuilt without the rest.
    """

    single_positions = False

    def __init__(self, source: Layout, target: Layout) -> None:
        super().__init__()
        self.source = source
        self.target_size = (target.height, target.width)
        self.size = (min(source.height, target.height), min(source.width, target.width))
        self.ratio = min(target.height / self.size[0], target.width / self.size[1])
        self.pool = average_pooling((source.height, source.width), self.size)
        self.finish: Resampling | None = None

    def interpolate_rest(self, factor: int) -> None:
        """Prepares the interpolation to the target's size, where `decode` enlarges its grid by `factor`.

        A decoder need not call it; the matrices are then made in each step.
        """
        self.finish = interpolation((factor * self.size[0], factor * self.size[1]), self.target_size)

    @property
    def patch(self) -> int | None:
        """The side of the target's patch that belongs to a position; None where the target does not divide so."""
        side = self.target_size[0] // self.size[0]
        divides = self.target_size == (side * self.size[0], side * self.size[1])
        return side if divides and side == upsampling_factor(self.ratio) else None

    def forward(self, features: Tensor, positions: Tensor | None = None) -> Tensor:
        """Rebuilds the target, or patches of it.

        Args:
            features: in the source's layout.
            positions: (batch, count) positions of a grid of `size`, row by row, whose patches are rebuilt alone; only
                of a decoder with `single_positions` and a `patch`.

        Returns:
            (batch, target.channels, target.height, target.width); of some positions the patches, one below the other,
            (batch, target.channels, count * patch, patch).
        """
        grid = self.pool(self.source.grid(features))
        if positions is not None:
            return self.decode(select(grid, positions))
        decoded = self.decode(grid)
        size = (decoded.shape[2], decoded.shape[3])
        if size == self.target_size:
            return decoded
        return (self.finish or interpolation(size, self.target_size, device=decoded.device))(decoded)

    def decode(self, grid: Tensor) -> Tensor:
        """Maps (batch, source.channels, *self.size) to (batch, target.channels, height, width), any size."""
        raise NotImplementedError


class ReduceChannels(nn.Module):
    """A linear map of each position's `channels` to `width`, normalised: what all decoders begin with.

    The norm keeps the type that the linear map gives under autocast, whose own rule for norms would keep
    maps in float32 for backward. The kernels compute its mean and variance in float32 in either case.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Conv2d(channels, width, 1, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, grid: Tensor) -> Tensor:
        """Maps (batch, channels, height, width) to as large a grid of fewer channels."""
        reduced = self.linear(grid).permute(0, 2, 3, 1)
        weight, bias = self.norm.weight.to(reduced.dtype), self.norm.bias.to(reduced.dtype)
        with torch.autocast(reduced.device.type, enabled=False):
            normed = F.layer_norm(reduced, self.norm.normalized_shape, weight, bias, self.norm.eps)
        return normed.permute(0, 3, 1, 2)


def upsampling_factor(ratio: float) -> int:
    """The whole number to upsample by where the target is `ratio` times larger, at least 1."""
    return min(int(ratio + 0.5), MAX_FACTOR)


def project_to_pixels(width: int, channels: int, factor: int) -> nn.Sequential:
    """A linear map from each position's `width` channels to its own `factor` x `factor` patch of pixels."""
    return nn.Sequential(nn.Conv2d(width, channels * factor**2, 1), nn.PixelShuffle(factor))
