"""The transformer decoder."""

import math

from timm.models.vision_transformer import Block
from timm.models.vision_transformer_sam import window_partition, window_unpartition
from torch import Tensor

from localprop.decoders.common import Decoder, ReduceChannels, project_to_pixels, upsampling_factor
from localprop.features import Layout

HEAD_DIM = 16
MAX_WINDOW = 16


class TransformerDecoder(Decoder):
    """Reduces channels to a quarter, applies one light transformer block, and projects positions to pixels.

    Attention stays within windows of at most 16 x 16 (as in ViTDet, ECCV 2022), so that its cost grows with
    the number of positions and not with its square; grids up to that size, a ViT's at 224 pixels among them,
    are one window. A block keeps about ten maps of its width for backward, which is why it is this narrow and
    its MLP no wider.
    """

    def __init__(self, source: Layout, target: Layout) -> None:
        super().__init__(source, target)
        width = HEAD_DIM * math.ceil(source.channels / 4 / HEAD_DIM)
        side = max(self.size)
        self.window = math.ceil(side / math.ceil(side / MAX_WINDOW))
        self.reduce = ReduceChannels(source.channels, width)
        self.block = Block(width, num_heads=width // HEAD_DIM, mlp_ratio=1, qkv_bias=True)
        factor = upsampling_factor(self.ratio)
        self.project = project_to_pixels(width, target.channels, factor)
        self.interpolate_rest(factor)

    def decode(self, grid: Tensor) -> Tensor:
        """Maps the source grid to the target's channels, at the whole factor nearest to the ratio."""
        windows, padded_size = window_partition(self.reduce(grid).permute(0, 2, 3, 1), self.window)
        tokens = self.block(windows.flatten(1, 2))
        windows = tokens.unflatten(1, (self.window, self.window))
        grid = window_unpartition(windows, self.window, self.size, padded_size).permute(0, 3, 1, 2)
        return self.project(grid)
