"""Heads: auxiliary classifiers that read a feature map in its own layout and give one vector per image.

A head of `num_outputs` classes predicts the label; InfoPro's contrast uses the same heads as projectors.
To add a head, write its class in a file of its own and name it in `HEADS`.
"""

from torch import nn

from localprop.errors import ConfigError, suggestion
from localprop.features import Layout
from localprop.heads.conv import ConvHead
from localprop.heads.linear import LinearHead
from localprop.heads.mlp import MlpHead

HEADS: dict[str, type[nn.Module]] = {"linear": LinearHead, "mlp": MlpHead, "conv": ConvHead}


def build_head(name: str, layout: Layout, num_outputs: int) -> nn.Module:
    """Builds the head `name` for features of `layout`.

    Returns:
        A module that maps features in their own layout to (batch, `num_outputs`).

    Raises:
        ConfigError: there is no head of that name.
    """
    if name not in HEADS:
        raise ConfigError(f"unknown head {name!r}; {suggestion(name, HEADS)}")
    return HEADS[name](layout, num_outputs)
