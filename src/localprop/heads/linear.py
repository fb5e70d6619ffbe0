"""The linear head."""

import dataclasses

from torch import Tensor, nn

from localprop.features import Layout


class LinearHead(nn.Module):
    """LayerNorm, average pool, linear: the head of TRGL (NeurIPS 2023, arXiv 2309.17357).

    The norm comes before the pool, as in the source: every position weighs the same whatever its scale.
    What it keeps for backward is the feature map itself and two numbers per position; the normalised map is
    pooled and freed.
    """

    def __init__(self, layout: Layout, num_outputs: int) -> None:
        super().__init__()
        self.layout = layout
        self.norm = nn.LayerNorm(layout.channels)
        self.fc = nn.Linear(layout.channels, num_outputs)

    def forward(self, features: Tensor) -> Tensor:
        """Maps features in their own layout to (batch, num_outputs)."""
        tokens = self.norm(self.layout.tokens(features))
        return self.fc(dataclasses.replace(self.layout, kind="NLC").pooled(tokens))
