"""Small images, all held in memory; batches are made by tensor operations on the device."""

import os
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from localprop.data.base import Pixels
from localprop.data.images.augment import random_crop, random_hflip, resize
from localprop.data.transfer import on_device, prefetch
from localprop.data.view import WHOLE, View
from localprop.seeding import derive_seed, generator


@dataclass
class MemoryStore:
    """Images in main memory, from where each batch goes to the device as bytes.

    They stay off the device, unless asked: there, they take of the memory that local learning saves.

    Args:
        train_images: (images, 3, side, side), uint8, at their native side.
        train_labels: (images,), int64.
        test_images: likewise, or where they differ in size a list of (3, height, width), uint8.
        test_labels: (images,), int64.
        img_size: side of the batches' images in pixels.
        crop_pad: padding before the random crop, in native pixels.
        hflip: chance of a horizontal flip.
        seed: of crops and flips.
        skipped: paths of the training images that were unreadable.
        hold_on_device: keep images and labels on the device that batches are first asked for on; test images that are
            not of the input size stay off it.
        view: how test images are shown where nothing else has been recorded.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor | list[Tensor]
    test_labels: Tensor
    img_size: int
    crop_pad: int
    hflip: float
    seed: int
    skipped: list[str] = field(default_factory=list)
    hold_on_device: bool = False
    view: View = WHOLE

    def __post_init__(self) -> None:
        self.train_size = len(self.train_images)
        self.test_size = len(self.test_images)

    def train(
        self, epoch: int, order: list[int], batch_size: int, steps: range, device: torch.device
    ) -> Iterator[Pixels]:
        """Cropped, flipped and resized batches; see `localprop.data.base.Store`."""
        self._settle(device)
        batches = (self._batch(epoch, step, order[step * batch_size : (step + 1) * batch_size]) for step in steps)
        with closing(self._prefetched(batches, device)) as ready:
            for images, labels in ready:
                yield resize(on_device(images, device), self.img_size), on_device(labels, device)

    def test(self, batch_size: int, device: torch.device, view: View) -> Iterator[Pixels]:
        """Batches in order; images of another size than the input's are resized by timm, for an export is by no other.

        See `localprop.data.base.Store`.
        """
        self._settle(device)
        with closing(self._prefetched(self._test_batches(batch_size, view), device)) as ready:
            for images, labels in ready:
                yield on_device(images, device), on_device(labels, device)

    def testing_on(self, other: "MemoryStore") -> "MemoryStore":
        """See `localprop.data.base.Store`."""
        return replace(self, test_images=other.test_images, test_labels=other.test_labels)

    def release(self) -> None:
        """Frees all images and labels."""
        for name in ("train_images", "train_labels", "test_images", "test_labels"):
            values = getattr(self, name)
            setattr(self, name, values[:0].clone() if isinstance(values, Tensor) else [])

    @property
    def held_bytes(self) -> int:
        """Bytes of images and labels that lie on a GPU for good."""
        tensors = [self.train_images, self.train_labels, self.test_labels]
        tensors += [self.test_images] if isinstance(self.test_images, Tensor) else []
        return sum(tensor.nbytes for tensor in tensors if tensor.device.type == "cuda")

    def _batch(self, epoch: int, step: int, chosen: list[int]) -> Pixels:
        """Cropped and flipped images, and their labels, where the dataset is held."""
        places = on_device(torch.tensor(chosen), self.train_images.device)
        draws = generator(derive_seed(self.seed, "crop", epoch, step))
        # index_select copies whole images; plain indexing goes byte by byte and is ten times slower.
        images = random_crop(self.train_images.index_select(0, places), self.crop_pad, draws)
        return random_hflip(images, self.hflip, draws), self.train_labels.index_select(0, places)

    def _test_batches(self, batch_size: int, view: View) -> Generator[Pixels, None, None]:
        """Test images as `view` shows them, and their labels, where the dataset is held."""
        transform = view.transform(self.img_size)
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            for start in range(0, self.test_size, batch_size):
                images = self.test_images[start : start + batch_size]
                if isinstance(images, list) or not view.keeps(images.shape[3], images.shape[2], self.img_size):
                    images = torch.stack(list(pool.map(partial(_transformed, transform), images)))
                yield images, self.test_labels[start : start + batch_size]

    def _prefetched(
        self, batches: Generator[Pixels, None, None], device: torch.device
    ) -> Generator[Pixels, None, None]:
        # On a CPU a thread would take a core from training; images that are held on a GPU are cropped there at once.
        held = self.train_images.device.type != "cpu"
        return batches if device.type == "cpu" or held else prefetch(batches)

    def _settle(self, device: torch.device) -> None:
        # Everything at once, so that the first training step meets the memory that the last one does.
        if self.hold_on_device:
            self.train_images, self.train_labels = self.train_images.to(device), self.train_labels.to(device)
            if isinstance(self.test_images, Tensor) and self.test_images.shape[-1] == self.img_size:
                self.test_images = self.test_images.to(device)
            self.test_labels = self.test_labels.to(device)


def _transformed(transform: Callable[[Image.Image], Tensor], image: Tensor) -> Tensor:
    return transform(to_pil_image(image.cpu()))
