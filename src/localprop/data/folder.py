"""Folders of images: `PATH/train/<class>/*` and `PATH/test/<class>/*` or `PATH/val/<class>/*`."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets.folder import is_image_file, make_dataset

from localprop.errors import DataError

# Images up to this side are held in memory: a hundred thousand of them take a few GB at most.
SMALL_SIDE = 96


class File(NamedTuple):
    """The path of an image, and its label."""

    path: str
    label: int


class Unreadable(NamedTuple):
    """The path of an image that cannot be read, and what is wrong with it, path included."""

    path: str
    problem: str


def list_folder(root: Path, with_test: bool = True) -> tuple[list[str], list[File], list[File]]:
    """Lists classes (sorted by name), training and, `with_test`, test files of a folder; test/ goes before val/.

    Hidden folders and files, which file managers and notebooks leave behind, are no classes and no images.

    Raises:
        DataError: a folder is missing or empty, or training and test classes differ.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; --data folder:PATH needs PATH/train and PATH/test or PATH/val")
    train = root / "train"
    if not train.is_dir():
        raise DataError(f"{root} has no folder train/; put the training images into {train / '<class>'}")
    test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if with_test and test is None:
        raise DataError(
            f"{root} has no folder test/ or val/; put the test images into {root / 'test' / '<class>'}, "
            f"or hold training images out with --val-split"
        )
    classes = _class_names(train)
    if len(classes) < 2:
        raise DataError(f"{train} has {len(classes)} class folders; it needs one for each of two or more classes")
    if not with_test or test is None:
        return classes, _files(train, classes), []
    if differing := set(classes) ^ set(_class_names(test)):
        only = [f"{name!r} is only in {train if name in classes else test}" for name in sorted(differing)]
        raise DataError(f"the classes of {train} and {test} differ: {', '.join(only)}; give both the same folders")
    return classes, _files(train, classes), _files(test, classes)


def sample_sizes(files: list[File], count: int = 64) -> set[tuple[int, int]]:
    """The different (width, height) of up to `count` images spread over `files`, from their headers alone."""
    sizes = set()
    for file in files[:: -(-len(files) // count)]:
        try:
            with Image.open(file.path) as image:
                sizes.add(image.size)
        except Exception:  # the image is met again, and reported, when it is decoded
            continue
    return sizes


def read_image(path: str) -> Image.Image:
    """Decodes an image of any common format as RGB.

    Raises:
        DataError: it is missing, truncated, no image at all, or has more than 8 bits per channel.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError("more than 8 bits per channel; convert it to 8")
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise DataError(f"{path} is unreadable (not an image)") from None
    except Exception as error:  # what PIL's decoders raise for a damaged file is any of a dozen types
        raise DataError(f"{path} is unreadable ({reason(error)})") from None


def read_images(files: list[File], side: int, on_unreadable: Callable[[Unreadable], None]) -> tuple[Tensor, Tensor]:
    """Decodes all images, squeezed to `side` x `side` where they differ, in threads.

    Returns:
        images (images, 3, side, side), uint8, and labels (images,), int64; the unreadable ones left out.
    """
    images = np.empty((len(files), 3, side, side), dtype=np.uint8)
    labels = torch.tensor([file.label for file in files])
    readable = torch.ones(len(files), dtype=torch.bool)

    def decode(block: range) -> list[tuple[int, Unreadable]]:
        unreadable = []
        for index in block:
            path = files[index].path
            try:
                image = read_image(path)
            except DataError as error:
                unreadable.append((index, Unreadable(path, str(error))))
                continue
            if image.size != (side, side):
                image = image.resize((side, side), Image.Resampling.BILINEAR)
            images[index] = np.asarray(image).transpose(2, 0, 1)
        return unreadable

    # Blocks, because handing over one small image takes as long as decoding it.
    blocks = [range(len(files))[first : first + 128] for first in range(0, len(files), 128)]
    pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
    try:
        for unreadable in pool.map(decode, blocks):
            for index, bad in unreadable:
                readable[index] = False
                on_unreadable(bad)
    finally:
        pool.shutdown(cancel_futures=True)
    pixels = torch.from_numpy(images)
    return (pixels, labels) if readable.all() else (pixels[readable], labels[readable])


def skip_image(skipped: list[str], bad: Unreadable, limit: int) -> None:
    """Notes an unreadable training image in `skipped`.

    Raises:
        DataError: there are now more than `limit`.
    """
    if bad.path in skipped:
        return
    if len(skipped) >= limit:
        raise DataError(
            f"{bad.problem}, and {len(skipped)} training images before it; repair or delete them, "
            f"or allow more with --bad-images"
        )
    skipped.append(bad.path)


def refuse_image(bad: Unreadable) -> None:
    """Ends an evaluation over an unreadable image: an accuracy is over all images or it is another number.

    Raises:
        DataError: always.
    """
    raise DataError(f"{bad.problem}, and evaluation leaves nothing out; repair or delete it")


def reason(error: Exception) -> str:
    """What an exception says, on one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _class_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _files(folder: Path, classes: list[str]) -> list[File]:
    labels = {name: label for label, name in enumerate(classes)}
    found = make_dataset(folder, labels, is_valid_file=_is_image, allow_empty=True)
    files = [File(path, label) for path, label in found]
    filled = {file.label for file in files}
    if empty := [str(folder / name) for name, label in labels.items() if label not in filled]:
        raise DataError(f"no images in {', '.join(empty)}; fill the class folder or delete it")
    return files


def _is_image(path: str) -> bool:
    return is_image_file(path) and not os.path.basename(path).startswith(".")
