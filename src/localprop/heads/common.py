"""What heads share: where in a network a head stands, for those that resemble what follows."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from localprop.features import Layout
from localprop.tracing.private import Weights
from localprop.tracing.units import Chain


@dataclass(frozen=True)
class Place:
    """Where in a network a head stands. Classes of heads with `needs_place = True` are given it as third argument.

    Attributes:
        model: the backbone.
        units: its chain.
        layouts: of the network's input, and of each unit's output.
        position: how many units come before what the head reads.
        index: of the module whose head it is, from 0.
        count: number of modules, K.
        weights: "none" while only the head's cost is asked for; else None, and the head decides.
    """

    model: nn.Module
    units: Chain
    layouts: Sequence[Layout]
    position: int
    index: int
    count: int
    weights: Weights | None = None
