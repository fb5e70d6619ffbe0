"""The convolutional head."""

import torch
from torch import Tensor, nn

from localprop.features import Layout

MAX_WIDTH = 512
FC_WIDTH = 128


class ConvHead(nn.Module):
    """InfoPro's auxiliary head "1c2f" (ICLR 2021) for any grid: one convolution, two fully connected layers.

    As in the source, the convolution halves the grid and doubles the channels, and keeps both where the grid
    has 8 rows or columns or fewer; for InfoPro's ResNets that gives its 16 -> 32, 32 -> 64, 64 -> 64. It has
    `MAX_WIDTH` channels at most, or the head of a wide transformer would outweigh a block.

    Prefix tokens lie on no grid, so their mean joins the pooled map. A vector per image is a grid of one
    position, which a 1 x 1 convolution reads; batch norm then needs more than one image per batch.
    """

    def __init__(self, layout: Layout, num_outputs: int) -> None:
        super().__init__()
        self.layout = layout
        stride = 2 if min(layout.height, layout.width) > 8 else 1
        kernel = 3 if max(layout.height, layout.width) > 1 else 1
        width = min(layout.channels * stride, MAX_WIDTH)
        self.conv = nn.Conv2d(layout.channels, width, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)
        self.mlp = nn.Sequential(
            nn.Linear(width + (layout.channels if layout.prefix else 0), FC_WIDTH),
            nn.ReLU(inplace=True),
            nn.Linear(FC_WIDTH, num_outputs),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Maps features in their own layout to (batch, num_outputs)."""
        pooled = self.act(self.norm(self.conv(self.layout.grid(features)))).mean((2, 3))
        if self.layout.prefix:
            prefix = self.layout.tokens(features)[:, : self.layout.prefix].mean(1)
            pooled = torch.cat([pooled, prefix], 1)
        return self.mlp(pooled)
