"""Variants that were tried when the defaults were chosen. docs/lab-notes.md has the results.

localprop bench benchmarks/lab/swin.yaml --plugin benchmarks/lab/variants.py --data cifar10=PATH
"""

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from localprop.heads import HEADS
from localprop.methods import METHODS


class WarmUp(METHODS["feature-reconstruction"]):
    """Feature reconstruction whose weight rises linearly from 0 over the first `steps` steps."""

    def __init__(self, spec, weight: float = 1.0, normalize: bool = True, steps: float = 0.0) -> None:
        super().__init__(spec, weight, normalize)
        self.full, self.steps = weight, steps
        self.register_buffer("step", torch.zeros(()))  # so that a resumed run continues with it

    def forward(
        self, output: Tensor, features: Tensor, inputs: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `LocalLoss.forward`."""
        self.step += 1
        self.weight = self.full * (self.step / self.steps).clamp(max=1)
        return super().forward(output, features, inputs, targets)


class WideHead(nn.Module):
    """The head `mlp`, four times as wide inside."""

    def __init__(self, layout, num_outputs: int) -> None:
        super().__init__()
        self.layout, width = layout, layout.channels
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, num_outputs)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Maps features in their own layout to (batch, num_outputs)."""
        return self.mlp(self.layout.pooled(features))


class BlockHead(nn.Module):
    """A transformer block on the grid, pooled to at most 8 x 8, before norm, pool and a linear layer.

    AugLocal (ICLR 2024) and MAN (ECCV 2024) find that a head should resemble the layers that follow in the network.
    """

    def __init__(self, layout, num_outputs: int) -> None:
        super().__init__()
        self.layout = layout
        self.side = min(8, layout.height, layout.width)
        self.block = Block(layout.channels, num_heads=max(1, layout.channels // 16), mlp_ratio=4, qkv_bias=True)
        self.norm, self.fc = nn.LayerNorm(layout.channels), nn.Linear(layout.channels, num_outputs)

    def forward(self, features: Tensor) -> Tensor:
        """Maps features in their own layout to (batch, num_outputs)."""
        tokens = F.adaptive_avg_pool2d(self.layout.grid(features), self.side).flatten(2).transpose(1, 2)
        return self.fc(self.norm(self.block(tokens)).mean(1))


METHODS["warm-up"] = WarmUp
HEADS["wide"] = WideHead
HEADS["block"] = BlockHead
