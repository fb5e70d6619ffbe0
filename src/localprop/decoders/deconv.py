"""The decoder of transposed convolutions."""

import math

from torch import Tensor, nn

from localprop.decoders.common import MAX_FACTOR, MIN_WIDTH, Decoder, ReduceChannels
from localprop.features import Layout


class DeconvDecoder(Decoder):
    """Reduces channels, then doubles the grid by transposed convolutions until it is about as large.

    A kernel (4 x 4) twice the stride covers every pixel equally often, which leaves no checkerboard, and lets
    neighbours share. Widths are the target's, doubled at each step back from it, so that every map on the way
    is at most half the size of the next. Where the ratio is below sqrt(2), one 3 x 3 convolution stands for
    the chain.
    """

    def __init__(self, source: Layout, target: Layout) -> None:
        super().__init__(source, target)
        doublings = round(math.log2(min(self.ratio, MAX_FACTOR)))
        widths = [
            max(min(target.channels * 2**step, source.channels // 2), MIN_WIDTH)
            for step in range(max(doublings, 1), 0, -1)
        ]
        kernel, stride = (4, 2) if doublings else (3, 1)
        self.reduce = ReduceChannels(source.channels, widths[0])
        self.layers = nn.Sequential()
        for width, following in zip(widths, [*widths[1:], target.channels], strict=True):
            self.layers.append(nn.ReLU(inplace=True))
            self.layers.append(nn.ConvTranspose2d(width, following, kernel, stride, padding=1))
        self.interpolate_rest(2**doublings)

    def decode(self, grid: Tensor) -> Tensor:
        """Maps the source grid to the target's channels, at the power of two nearest to the ratio."""
        return self.layers(self.reduce(grid))
