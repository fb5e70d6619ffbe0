"""The MLP per token."""

from torch import Tensor, nn

from localprop.decoders.common import (
    MIN_WIDTH,
    Decoder,
    ReduceChannels,
    project_to_pixels,
    upsampling_factor,
)
from localprop.features import Layout


class PixelShuffleDecoder(Decoder):
    """A two-layer MLP per position, whose output is rearranged into that position's patch of the target.

    The norm stands after the first linear layer, not before: there it makes the MLP just as blind to the
    scale of the features, and keeps a map of half the source's channels for backward instead of all of them.
    With ReLU in place, that map and the MLP's hidden one, together the size of the source, are all that is
    kept; nothing at the target's resolution is.
    """

    single_positions = True

    def __init__(self, source: Layout, target: Layout) -> None:
        super().__init__(source, target)
        width = max(source.channels // 2, MIN_WIDTH)
        self.reduce = ReduceChannels(source.channels, width)
        self.act = nn.ReLU(inplace=True)
        factor = upsampling_factor(self.ratio)
        self.project = project_to_pixels(width, target.channels, factor)
        self.interpolate_rest(factor)

    def decode(self, grid: Tensor) -> Tensor:
        """Maps the source grid to the target's channels, at the whole factor nearest to the ratio."""
        return self.project(self.act(self.reduce(grid)))
