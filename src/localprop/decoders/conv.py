"""The convolutional decoder."""

from torch import Tensor, nn

from localprop.decoders.common import MIN_WIDTH, Decoder, ReduceChannels
from localprop.features import Layout
from localprop.grids.resampling import interpolation


class ConvDecoder(Decoder):
    """Reduces channels, interpolates bilinearly, and convolves 3 x 3 to the target's channels.

    The decoder of InfoPro (ICLR 2021), with the reduction moved before the upsampling. The convolution keeps
    the upsampled map for backward, so half the target's channels make it cost half of what the target does.
    """

    def __init__(self, source: Layout, target: Layout) -> None:
        super().__init__(source, target)
        width = max(target.channels // 2, MIN_WIDTH)
        self.reduce = ReduceChannels(source.channels, width)
        self.act = nn.ReLU(inplace=True)
        self.upsample = interpolation(self.size, self.target_size)
        self.conv = nn.Conv2d(width, target.channels, 3, padding=1)

    def decode(self, grid: Tensor) -> Tensor:
        """Maps the source grid to the target's size and channels."""
        return self.conv(self.upsample(self.act(self.reduce(grid))))
