"""The two-layer head."""

from torch import Tensor, nn

from localprop.features import Layout


class MlpHead(nn.Module):
    """Average pool, LayerNorm, linear, GELU, linear, as wide inside as the features.

    Pooling comes first, as in timm's `NormMlpClassifierHead`: nothing larger than one vector per image is
    kept for backward, not even the feature map, and the norm costs nothing.
    """

    def __init__(self, layout: Layout, num_outputs: int) -> None:
        super().__init__()
        self.layout = layout
        self.mlp = nn.Sequential(
            nn.LayerNorm(layout.channels),
            nn.Linear(layout.channels, layout.channels),
            nn.GELU(),
            nn.Linear(layout.channels, num_outputs),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Maps features in their own layout to (batch, num_outputs)."""
        return self.mlp(self.layout.pooled(features))
