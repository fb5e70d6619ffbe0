"""What a network sees of an image in evaluation: recorded with a run, written into its export, and done by timm."""

import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image
from timm.data import DEFAULT_CROP_PCT, create_transform
from torch import Tensor

Channels = tuple[float, float, float]


@dataclass(frozen=True)
class View:
    """How an image becomes one of the network's input size, in timm's words.

    Args:
        interpolation: "bilinear", "bicubic", ...
        crop_pct: part of the resized image's side that is seen.
        crop_mode: "center" cuts the middle out, "squash" changes the aspect ratio, "border" pads.
    """

    interpolation: str = "bilinear"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    def transform(self, img_size: int) -> Callable[[Image.Image], Tensor]:
        """The transform of timm itself, but for the normalisation: from an image to (3, img_size, img_size), uint8."""
        return create_transform((3, img_size, img_size), normalize=False, **asdict(self))

    def keeps(self, width: int, height: int, img_size: int) -> bool:
        """Whether the transform leaves images of this size as they are."""
        return width == height == img_size and self.crop_pct == 1


CROPPED = View(crop_pct=DEFAULT_CROP_PCT)
WHOLE = View()
SQUASHED = View(crop_mode="squash")


def evaluation_record(img_size: int, mean: Channels, std: Channels, view: View) -> dict[str, Any]:
    """All that decides what a network sees of an image, as timm's `create_transform` takes it."""
    return {"input_size": [3, img_size, img_size], "mean": list(mean), "std": list(std), **asdict(view)}


def read_evaluation(record: Any) -> tuple[int, Channels, Channels, View]:
    """The image size, mean, standard deviation and view that `evaluation_record` wrote.

    Raises:
        ValueError: it is damaged; says in which part.
    """
    if not isinstance(record, dict):
        raise ValueError("it is no mapping")
    size = record.get("input_size")
    if not (isinstance(size, list) and len(size) == 3 and size == [3, size[1], size[1]] and _is_side(size[1])):
        raise ValueError(f"input_size is {size!r}")
    mean, std = (_channels(record, key, least) for key, least in (("mean", -math.inf), ("std", 0)))
    view = View(*(record.get(key) for key in ("interpolation", "crop_pct", "crop_mode")))  # type: ignore[arg-type]
    if view.interpolation not in ("bilinear", "bicubic", "nearest", "lanczos", "box", "hamming"):
        raise ValueError(f"interpolation is {view.interpolation!r}")
    if not (isinstance(view.crop_pct, int | float) and 0.01 <= view.crop_pct <= 1):
        raise ValueError(f"crop_pct is {view.crop_pct!r}")
    if view.crop_mode not in ("center", "squash", "border"):
        raise ValueError(f"crop_mode is {view.crop_mode!r}")
    return size[1], mean, std, view


def _channels(record: dict[str, Any], key: str, least: float) -> Channels:
    values = record.get(key)
    if not (isinstance(values, list) and len(values) == 3 and all(_is_finite(v) and v > least for v in values)):
        raise ValueError(f"{key} is {values!r}")
    return values[0], values[1], values[2]


def _is_side(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
