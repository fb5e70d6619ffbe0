"""Heads: auxiliary classifiers that read a feature map in its own layout and give one vector per image.

A head of `num_outputs` classes predicts the label; InfoPro's contrast uses the same heads as projectors.
To add a head, write its class in a file of its own and add a line to `HEADS` in `localprop.registry`.
"""

from torch import nn

from localprop.features import Layout
from localprop.registry import HEADS

__all__ = ["HEADS", "build_head"]


def build_head(name: str, layout: Layout, num_outputs: int) -> nn.Module:
    """Builds the head `name` for features of `layout`.

    Returns:
        A module that maps features in their own layout to (batch, `num_outputs`).

    Raises:
        ConfigError: there is no head of that name.
    """
    return HEADS.lookup(name)(layout, num_outputs)
