"""The decoder of InfoPro."""

from torch import Tensor, nn

from localprop.decoders.common import Decoder
from localprop.features import Layout
from localprop.grids.resampling import interpolation

_WIDTH = 12


class InfoProDecoder(Decoder):
    """Interpolates bilinearly, then convolves 3 x 3 twice, as InfoPro (ICLR 2021) does; for comparison with it.

    It upsamples before it reduces channels, against the rule of the other decoders: on wide features it keeps a map
    for backward that is many times as large as the target. `conv` does the same in the cheaper order.
    """

    def __init__(self, source: Layout, target: Layout) -> None:
        super().__init__(source, target)
        self.upsample = interpolation(self.size, self.target_size, align_corners=True)
        self.conv1 = nn.Conv2d(source.channels, _WIDTH, 3, padding=1)
        self.norm = nn.BatchNorm2d(_WIDTH)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(_WIDTH, target.channels, 3, padding=1)

    def decode(self, grid: Tensor) -> Tensor:
        """Maps the source grid to the target's size and channels."""
        return self.conv2(self.act(self.norm(self.conv1(self.upsample(grid)))))
