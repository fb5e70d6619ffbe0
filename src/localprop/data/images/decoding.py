"""Decodes folders of small images that are held in memory, many of them in processes."""

import os
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from localprop.data.images.folder import OnUnreadable, Unreadable
from localprop.data.images.reading import image_size, read_image
from localprop.data.images.walk import File
from localprop.data.images.workers import batches_of, exits_on_sigterm, set_up_worker
from localprop.errors import DataError

# Images up to this side are held in memory: a hundred thousand of them take a few GB at most.
SMALL_SIDE = 96
# Files that a process decodes at a time: sending one small image takes as long as decoding it.
_BLOCK = 128
# Starting a process takes as long as decoding some hundred small images. More than eight would wait for the disk.
_FILES_PER_PROCESS = 1000
_MOST_PROCESSES = 8

T = TypeVar("T")
Work = Callable[[list[File]], T]
_Size = tuple[int, int]


def small_sizes(files: list[File], in_processes: bool = True) -> set[_Size] | None:
    """The different (width, height) of all images, from their headers; None as soon as one is larger than `SMALL_SIDE`.

    A damaged image is left out here, and reported when it is decoded.

    Args:
        files: of the images.
        in_processes: whether other processes may read them, if there are many.
    """
    # A folder of large images is known by its first block, for which no process is started.
    sizes = _sizes(files[:_BLOCK])
    with exits_on_sigterm(), closing(_in_blocks(files[_BLOCK:], _sizes, in_processes)) as blocks:
        while not any(max(size) > SMALL_SIDE for size in sizes):
            found = next(blocks, None)
            if found is None:
                return sizes
            sizes |= found
    return None


@overload
def read_images(
    files: list[File], side: int, on_unreadable: OnUnreadable, in_processes: bool = True
) -> tuple[Tensor, Tensor]: ...
@overload
def read_images(
    files: list[File], side: int | None, on_unreadable: OnUnreadable, in_processes: bool = True
) -> tuple[Tensor | list[Tensor], Tensor]: ...
def read_images(
    files: list[File], side: int | None, on_unreadable: OnUnreadable, in_processes: bool = True
) -> tuple[Tensor | list[Tensor], Tensor]:
    """Decodes all images.

    Args:
        files: of the images.
        side: the width and height to which images of other sizes are squeezed; None leaves them as they are.
        on_unreadable: called with each image that cannot be read, in the order of the files.
        in_processes: whether other processes may decode, if there are many images.

    Returns:
        images (images, 3, side, side), uint8, or without a side a list of (3, height, width); and labels (images,),
        int64; the unreadable ones left out.

    Raises:
        DataError: a process that decodes was killed; and what `on_unreadable` raises.
    """
    pixels = None if side is None else np.empty((len(files), 3, side, side), dtype=np.uint8)
    listed: list[Tensor] = []
    labels: list[int] = []
    with exits_on_sigterm(), closing(_in_blocks(files, partial(_decode, side=side), in_processes)) as blocks:
        for block in blocks:
            for bad in block.unreadable:
                on_unreadable(bad)
            if pixels is None:
                listed += map(torch.from_numpy, block.images)
            else:
                pixels[len(labels) : len(labels) + len(block.labels)] = block.images
            labels += block.labels
    images = listed if pixels is None else torch.from_numpy(pixels)[: len(labels)]
    return images, torch.tensor(labels, dtype=torch.int64)


class _Decoded(NamedTuple):
    """The readable images of a block, as arrays: torch would send tensors through shared memory, which may be small."""

    images: Any
    labels: list[int]
    unreadable: list[Unreadable]


def _decode(files: list[File], side: int | None) -> _Decoded:
    images, labels, unreadable = [], [], []
    for file in files:
        try:
            image = read_image(file.path)
        except DataError as error:
            unreadable.append(Unreadable(file.path, str(error)))
            continue
        if side is not None and image.size != (side, side):
            image = image.resize((side, side), Image.Resampling.BILINEAR)
        images.append(np.asarray(image).transpose(2, 0, 1).copy())
        labels.append(file.label)
    whole = images if side is None else np.array(images, dtype=np.uint8).reshape(-1, 3, side, side)
    return _Decoded(whole, labels, unreadable)


def _sizes(files: list[File]) -> set[_Size]:
    return {size for file in files if (size := image_size(file.path))}


@dataclass(frozen=True)
class _Blocks(Dataset, Generic[T]):
    """The result of `work` for each block of files."""

    files: list[File]
    work: Work[T]

    def __len__(self) -> int:
        return -(-len(self.files) // _BLOCK)

    def __getitem__(self, number: int) -> T:
        return self.work(self.files[number * _BLOCK : (number + 1) * _BLOCK])


def _in_blocks(files: list[File], work: Work[T], in_processes: bool) -> Generator[T, None, None]:
    """The results of `work` for blocks of files, in order. With few files it runs in this process."""
    processes = min(len(files) // _FILES_PER_PROCESS, _cores(), _MOST_PROCESSES) if in_processes else 0
    loader = DataLoader(
        _Blocks(files, work),
        batch_size=None,
        num_workers=processes,
        collate_fn=_unchanged,
        generator=torch.Generator(),  # or else the loader would draw from the global one
        worker_init_fn=set_up_worker,
        prefetch_factor=8 if processes else None,
    )
    return batches_of(loader)


def _unchanged(block: T) -> T:
    return block


def _cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
