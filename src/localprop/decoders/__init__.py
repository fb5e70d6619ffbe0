"""Decoders: rebuild a target grid (the image, or a module's input features) from a feature map.

To add a decoder, write a `Decoder` in a file of its own and add a line to `DECODERS` in
`localprop.registry`.
"""

from localprop.decoders.common import Decoder
from localprop.features import Layout
from localprop.registry import DECODERS

__all__ = ["DECODERS", "build_decoder"]


def build_decoder(name: str, source: Layout, target: Layout) -> Decoder:
    """Builds the decoder `name` from features of layout `source` to the grid of layout `target`.

    Returns:
        A module that maps features in their own layout to the target's (batch, channels, height, width).

    Raises:
        ConfigError: there is no decoder of that name.
    """
    return DECODERS.lookup(name)(source, target)
