"""Decoders: rebuild a target grid (the image, or a module's input features) from a feature map.

To add a decoder, write a `Decoder` in a file of its own and name it in `DECODERS`.
"""

from localprop.decoders.common import Decoder
from localprop.decoders.conv import ConvDecoder
from localprop.decoders.deconv import DeconvDecoder
from localprop.decoders.infopro import InfoProDecoder
from localprop.decoders.pixel_shuffle import PixelShuffleDecoder
from localprop.decoders.transformer import TransformerDecoder
from localprop.errors import ConfigError, suggestion
from localprop.features import Layout

DECODERS: dict[str, type[Decoder]] = {
    "conv": ConvDecoder,
    "deconv": DeconvDecoder,
    "pixel-shuffle": PixelShuffleDecoder,
    "transformer": TransformerDecoder,
    "infopro": InfoProDecoder,
}


def build_decoder(name: str, source: Layout, target: Layout) -> Decoder:
    """Builds the decoder `name` from features of layout `source` to the grid of layout `target`.

    Returns:
        A module that maps features in their own layout to the target's (batch, channels, height, width).

    Raises:
        ConfigError: there is no decoder of that name.
    """
    if name not in DECODERS:
        raise ConfigError(f"unknown decoder {name!r}; {suggestion(name, DECODERS)}")
    return DECODERS[name](source, target)
