"""Folders of images: `PATH/train/<class>/*` and `PATH/test/<class>/*` or `PATH/val/<class>/*`."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from localprop.data.images import image_size, read_image
from localprop.data.walk import File, Passed, class_names, find_images
from localprop.errors import DataError, listing

# Images up to this side are held in memory: a hundred thousand of them take a few GB at most.
SMALL_SIDE = 96


class Unreadable(NamedTuple):
    """The path of an image that cannot be read, and what is wrong with it, path included."""

    path: str
    problem: str


OnUnreadable = Callable[[Unreadable], None]


@dataclass(frozen=True)
class Listing:
    """What a folder holds.

    Attributes:
        classes: names, sorted.
        train, test: images to train on and to evaluate.
        notes: lines for the user.
    """

    classes: list[str]
    train: list[File]
    test: list[File]
    notes: list[str]


def list_folder(root: Path, with_test: bool = True) -> Listing:
    """Lists classes, training and, `with_test`, test images of a folder; test/ goes before val/.

    Raises:
        DataError: a folder is missing, empty or unreadable, training and test classes differ, or as `find_images`.
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
    classes = class_names(train)
    if len(classes) < 2:
        raise DataError(f"{train} has {len(classes)} class folders; it needs one for each of two or more classes")
    if not with_test or test is None:
        files, passed = _images(train, classes)
        return Listing(classes, files, [], _notes(root, passed))
    if differing := set(classes) ^ set(class_names(test)):
        only = [f"{name!r} is only in {train if name in classes else test}" for name in sorted(differing)]
        raise DataError(f"the classes of {train} and {test} differ: {listing(only)}; give both the same folders")
    files, passed = _images(train, classes)
    test_files, more = _images(test, classes)
    return Listing(classes, files, test_files, _notes(root, passed + more))


def small_sizes(files: list[File]) -> set[tuple[int, int]] | None:
    """The different (width, height) of all images, from their headers; None as soon as one is larger than `SMALL_SIDE`.

    A damaged image says nothing: it is met again, and reported, when it is decoded.
    """
    sizes: set[tuple[int, int]] = set()
    for file in files:
        size = image_size(file.path)
        if size and max(size) > SMALL_SIDE:
            return None
        sizes |= {size} if size else set()
    return sizes


@overload
def read_images(files: list[File], side: int, on_unreadable: OnUnreadable) -> tuple[Tensor, Tensor]: ...
@overload
def read_images(files: list[File], side: None, on_unreadable: OnUnreadable) -> tuple[list[Tensor], Tensor]: ...
@overload
def read_images(
    files: list[File], side: int | None, on_unreadable: OnUnreadable
) -> tuple[Tensor | list[Tensor], Tensor]: ...
def read_images(
    files: list[File], side: int | None, on_unreadable: OnUnreadable
) -> tuple[Tensor | list[Tensor], Tensor]:
    """Decodes all images in threads.

    Args:
        files: of the images.
        side: the width and height to which those are squeezed that differ from it; None leaves them as they are.
        on_unreadable: called with each image that cannot be read.

    Returns:
        images (images, 3, side, side), uint8, or without a side a list of (3, height, width); and labels (images,),
        int64; the unreadable ones left out.
    """
    images: Any = [None] * len(files) if side is None else np.empty((len(files), 3, side, side), dtype=np.uint8)
    labels = torch.tensor([file.label for file in files], dtype=torch.int64)
    readable = torch.ones(len(files), dtype=torch.bool)
    stopped = Event()

    def decode(block: range) -> list[tuple[int, Unreadable]]:
        unreadable = []
        for index in block:
            if stopped.is_set():
                break
            path = files[index].path
            try:
                image = read_image(path)
            except DataError as error:
                unreadable.append((index, Unreadable(path, str(error))))
                continue
            if side is not None and image.size != (side, side):
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
        stopped.set()  # Ctrl-C waits for the images being decoded, not for their blocks
        pool.shutdown(cancel_futures=True)
    if side is None:
        return [torch.from_numpy(image.copy()) for image in images if image is not None], labels[readable]
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


def _images(folder: Path, classes: list[str]) -> tuple[list[File], list[Passed]]:
    labels = {name: label for label, name in enumerate(classes)}
    found = find_images(folder, labels)
    filled = {file.label for file in found.files}
    if empty := [str(folder / name) for name, label in labels.items() if label not in filled]:
        raise DataError(f"no images in {listing(empty)}; fill the class folder or delete it")
    return found.files, found.passed


def _notes(root: Path, passed: list[Passed]) -> list[str]:
    if not passed:
        return []
    names = [f"{os.path.relpath(path, root)} ({why})" for path, why in passed]
    return [f"passed over in {listing([root])}: {listing(names)}"]
