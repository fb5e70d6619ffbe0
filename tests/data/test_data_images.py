"""One image as a viewer shows it: transparency, orientation, 16 bits."""

import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from localprop.data.images.reading import read_image
from localprop.errors import DataError

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (20, 30, 1), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (20, 30), dtype=np.uint16)


def pixels(path) -> np.ndarray:
    image = read_image(str(path))
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def on_white(colours, alpha) -> np.ndarray:
    return colours * (alpha / 255) + 255 * (1 - alpha / 255)


@pytest.mark.parametrize("form", ["png", "webp", "tiff"])
def test_what_is_transparent_is_white(tmp_path, form):
    options = {"lossless": True, "exact": True} if form == "webp" else {}
    Image.fromarray(np.concatenate([COLOURS, ALPHA], 2)).save(tmp_path / f"a.{form}", **options)
    assert np.abs(pixels(tmp_path / f"a.{form}") - on_white(COLOURS, ALPHA)).max() <= 1


def test_a_shape_that_is_drawn_in_the_alpha_channel_is_seen(tmp_path):
    """Every colour is black: without the alpha channel there is nothing to see."""
    Image.fromarray(np.concatenate([COLOURS[..., :1] * 0, ALPHA], 2)).save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "LA"
    assert np.abs(pixels(tmp_path / "a.png") - (255 - ALPHA.astype(int))).max() <= 1


@pytest.mark.parametrize("form", ["png", "gif"])
def test_a_transparent_colour_of_a_palette_is_white(tmp_path, form):
    image = Image.fromarray(COLOURS).quantize(8)
    numbers, colours = np.asarray(image), np.asarray(image.convert("RGB"))
    image.save(tmp_path / f"a.{form}", transparency=3)
    expected = np.where((numbers == 3)[..., None], 255, colours)
    assert (pixels(tmp_path / f"a.{form}") == expected).all()


@pytest.mark.parametrize("values", [COLOURS, COLOURS[..., 0], DEEP], ids=["rgb", "grey", "grey of 16 bits"])
def test_a_colour_that_stands_for_transparency_is_white(tmp_path, values):
    key = tuple(values[4, 5].tolist()) if values.ndim == 3 else int(values[4, 5])
    Image.fromarray(values).save(tmp_path / "a.png", transparency=key)
    grey = values >> 8 if values is DEEP else values
    same = values == key if values.ndim == 2 else (values == key).all(2)
    expected = np.where(same[..., None], 255, grey if grey.ndim == 3 else grey[..., None])
    assert (pixels(tmp_path / "a.png") == expected).all()


def test_a_colour_of_16_bits_that_stands_for_transparency_is_white(tmp_path):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    clear, other = struct.pack(">3H", 0x1234, 0x5678, 0x9ABC), struct.pack(">3H", 0x1000, 0x2000, 0x3000)
    chunks = chunk(b"IHDR", struct.pack(">2I5B", 2, 1, 16, 2, 0, 0, 0)) + chunk(b"tRNS", clear)
    chunks += chunk(b"IDAT", zlib.compress(b"\0" + clear + other)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    assert pixels(tmp_path / "a.png").tolist() == [[[255, 255, 255], [0x10, 0x20, 0x30]]]


def test_an_opaque_alpha_channel_changes_no_bit(tmp_path):
    Image.fromarray(np.concatenate([COLOURS, ALPHA * 0 + 255], 2)).save(tmp_path / "a.png")
    assert (pixels(tmp_path / "a.png") == COLOURS).all()


@pytest.mark.parametrize("form", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright_by_their_exif(tmp_path, form, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(COLOURS).save(tmp_path / f"a.{form}", exif=exif)
    with Image.open(tmp_path / f"a.{form}") as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert expected.shape == ((20, 30, 3) if orientation < 5 else (30, 20, 3))
    assert (pixels(tmp_path / f"a.{form}") == expected).all()


@pytest.mark.parametrize("raises", [False, True])
def test_damaged_exif_damages_no_image(tmp_path, monkeypatch, raises):
    if raises:  # as some versions of Pillow do
        monkeypatch.setattr(Image.Image, "getexif", lambda image: struct.unpack(">I", b""))
    Image.fromarray(COLOURS).save(tmp_path / "a.jpg", exif=b"Exif\0\0and nothing that Pillow could read")
    assert (pixels(tmp_path / "a.jpg") == np.asarray(Image.open(tmp_path / "a.jpg"))).all()


def test_an_ordinary_photograph_has_the_bits_that_pillow_gives(tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / "a.jpg")
    Image.fromarray(COLOURS).convert("CMYK").save(tmp_path / "b.jpg")
    Image.fromarray(COLOURS).convert("1").save(tmp_path / "c.png")
    for name in ("a.jpg", "b.jpg", "c.png"):
        with Image.open(tmp_path / name) as image:
            assert (pixels(tmp_path / name) == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize("form", ["png", "tiff", "pgm"])
def test_of_16_bits_the_upper_8_count(tmp_path, form):
    """Whatever the image: neighbouring grey values of a dim and of a bright one stay comparable."""
    for name, values in (("all", DEEP), ("dim", DEEP >> 6)):
        Image.fromarray(values).save(tmp_path / f"{name}.{form}")
        assert (pixels(tmp_path / f"{name}.{form}") == (values >> 8)[..., None]).all()


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_values_of_32_bits_are_refused_in_one_line(tmp_path, kind):
    path = tmp_path / "a.tiff"
    Image.fromarray(DEEP.astype(kind)).save(path)
    with pytest.raises(DataError) as caught:
        read_image(str(path))
    assert str(caught.value) == f"{path} is unreadable (32 bits per channel; convert it to 8 or 16)"


def test_of_an_animation_the_first_picture_counts(tmp_path):
    first, second = (Image.new("RGB", (30, 20), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    assert (pixels(tmp_path / "a.gif") == [255, 0, 0]).all()
