"""The size of the images that a model was built for, where the model tells it."""

from typing import Any

from torch import nn

from localprop.errors import ChainError


def own_input_size(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) that a timm or torchvision model was built for."""
    settings = getattr(model, "pretrained_cfg", None) or {}
    size = settings.get("input_size")
    if type(model).__module__.startswith("torchvision."):
        size = (3, 224, 224)
    sides = (getattr(m, name, None) for m in model.modules() for name in ("img_size", "image_size"))
    pairs = ((side, side) if isinstance(side, int) else side for side in sides)
    pair = next((pair for pair in pairs if isinstance(pair, (tuple, list)) and len(pair) == 2), None)
    if pair:
        size = (size[0] if size else 3, int(pair[0]), int(pair[1]))
    if size is None:
        raise ChainError(
            f"{type(model).__name__} does not tell the size of its images; pass input_size=(channels, height, width)"
        )
    return (_channels(model, settings.get("first_conv"), size[0]), size[1], size[2])


def _channels(model: nn.Module, first: Any, default: int) -> int:
    """Channels of the image, from the layer that timm's settings name as the first."""
    names = first if isinstance(first, (tuple, list)) else [first] if first else []
    modules = dict(model.named_modules())
    found = next((modules[name].in_channels for name in names if hasattr(modules.get(name), "in_channels")), default)
    # A stem that folds 2 x 2 or 4 x 4 pixels into one has a first layer with so many times the channels.
    return default if found in (4 * default, 16 * default) else found
