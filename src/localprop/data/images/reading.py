"""One image file: whether it is one, how large it is, and its pixels as a viewer shows them."""

import os

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from localprop.errors import DataError, first_line

Image.init()
# Nothing else is ever opened: Pillow runs Ghostscript for EPS, and rarely used decoders are rarely checked.
_WANTED: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
FORMATS = [name for name in _WANTED if name in Image.OPEN]
_SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS} | {".avif"}
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def has_known_suffix(name: str) -> bool:
    """Whether a file's name says that it is an image, of one of `FORMATS`."""
    return os.path.splitext(name)[1].lower() in _SUFFIXES


def image_size(path: str) -> tuple[int, int] | None:
    """(width, height) from the header of a regular file; None where it is no image of `FORMATS`."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except Exception:  # what Pillow raises for a damaged header is any of a dozen types
        return None


def read_image(path: str) -> Image.Image:
    """Decodes an image as RGB, as a viewer shows it: upright by its EXIF orientation, transparent parts white.

    Grey values of 16 bits become their upper 8. Of an animation the first picture is taken.

    Raises:
        DataError: the file is missing, truncated, no image of `FORMATS`, or has values of 32 bits.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            turn = _UPRIGHT.get(_orientation(image))
            shown = _on_white(_of_8_bits(image))
            return shown if turn is None else shown.transpose(turn)
    except UnidentifiedImageError:
        raise DataError(f"{path} is unreadable (not an image)") from None
    except Exception as error:  # what Pillow's decoders raise for a damaged file is any of a dozen types
        raise DataError(f"{path} is unreadable ({first_line(error)})") from None


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF says nothing, and damages no pixel
        return 1


def _of_8_bits(image: Image.Image) -> Image.Image:
    """The image with at most 8 bits per channel.

    Raises:
        ValueError: its values have 32 bits, and nothing says which of them is white.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    # Pillow gives 16-bit PGM, and in older versions PNG, as "I".
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError("32 bits per channel; convert it to 8 or 16")
    values = np.asarray(image).astype(np.uint16)
    grey = (values >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:  # of 16 bits; Pillow has taken the upper 8 of the pixels
        image.info["transparency"] = tuple(value >> 8 for value in key)
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
