"""Larger images, decoded and augmented one by one in worker processes."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from localprop.data.base import Pixels
from localprop.data.images.folder import Unreadable, refuse_image, skip_image
from localprop.data.images.reading import read_image
from localprop.data.images.walk import File
from localprop.data.images.workers import batches_of, set_up_worker
from localprop.data.view import CROPPED, View
from localprop.errors import DataError
from localprop.seeding import derive_seed, seeded

# An image, or None where none was readable; its label; the unreadable files met on the way.
Sample = tuple[Tensor | None, int, list[Unreadable]]


@dataclass
class StreamStore:
    """Images on disk, augmented by timm's transforms.

    An unreadable training image is replaced by the next readable one in the epoch's order, so batches keep
    their size and remain pure functions of (seed, epoch, batch), whichever worker met the bad file and
    wherever a run restarts.

    Args:
        train_files, test_files: paths with labels.
        img_size: side of the batches' images in pixels.
        hflip: chance of a horizontal flip.
        seed: of augmentation.
        workers: processes that decode; 0 decodes in the caller's.
        bad_images: unreadable training images before an error.
        skipped: paths of those met so far.
    """

    train_files: list[File]
    test_files: list[File]
    img_size: int
    hflip: float
    seed: int
    workers: int
    bad_images: int
    skipped: list[str] = field(default_factory=list)

    held_bytes = 0
    view = CROPPED

    def __post_init__(self) -> None:
        self.train_size = len(self.train_files)
        self.test_size = len(self.test_files)

    def release(self) -> None:
        """Nothing: images are on disk."""

    def train(
        self, epoch: int, order: list[int], batch_size: int, steps: range, device: torch.device
    ) -> Iterator[Pixels]:
        """Batches augmented by timm's training transform; see `localprop.data.base.Store`."""
        transform = create_transform(self.img_size, is_training=True, hflip=self.hflip, normalize=False)
        images = _Decoded(self.train_files, order, transform, self.bad_images, (self.seed, epoch))
        batches = [list(range(step * batch_size, (step + 1) * batch_size)) for step in steps]
        return self._batches(images, batches, device, self._skip)

    def test(self, batch_size: int, device: torch.device, view: View) -> Iterator[Pixels]:
        """Batches in order, through timm's evaluation transform; see `localprop.data.base.Store`."""
        order = list(range(self.test_size))
        images = _Decoded(self.test_files, order, view.transform(self.img_size), 0, None)
        batches = [order[first : first + batch_size] for first in range(0, self.test_size, batch_size)]
        return self._batches(images, batches, device, refuse_image)

    def testing_on(self, other: "StreamStore") -> "StreamStore":
        """See `localprop.data.base.Store`."""
        return replace(self, test_files=other.test_files)

    def _skip(self, bad: Unreadable) -> None:
        skip_image(self.skipped, bad, self.bad_images)

    def _batches(
        self,
        images: "_Decoded",
        batches: list[list[int]],
        device: torch.device,
        on_unreadable: Callable[[Unreadable], None],
    ) -> Iterator[Pixels]:
        loader = DataLoader(
            images,
            batch_sampler=batches,
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
            # Without one of its own the loader would draw from, and so move, the global generator.
            generator=torch.Generator(),
            worker_init_fn=set_up_worker,
        )
        for pixels, labels, unreadable in batches_of(loader):
            for bad in unreadable:
                on_unreadable(bad)
            if pixels is None:
                raise DataError(f"{unreadable[-1].problem}, like all other training images; repair them")
            yield pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)


@dataclass(frozen=True)
class _Decoded(Dataset):
    """Transformed images by position in `order`; passes over up to `patience` unreadable ones in a row."""

    files: list[File]
    order: list[int]
    transform: Callable
    patience: int
    seed_and_epoch: tuple[int, int] | None

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> Sample:
        unreadable: list[Unreadable] = []
        for shift in range(len(self.order)):
            file = self.files[self.order[(position + shift) % len(self.order)]]
            try:
                image = read_image(file.path)
            except DataError as error:
                unreadable.append(Unreadable(file.path, str(error)))
                if len(unreadable) > self.patience:
                    break
            else:
                with self._randomness(position):
                    return self.transform(image), file.label, unreadable
        return None, -1, unreadable

    def _randomness(self, position: int) -> AbstractContextManager[None]:
        if self.seed_and_epoch is None:
            return nullcontext()
        seed, epoch = self.seed_and_epoch
        # Of the image that belongs here: its replacement is then augmented otherwise than in its own place.
        return seeded(derive_seed(seed, "image", epoch, self.order[position]))


def _collate(samples: list[Sample]) -> tuple[Tensor | None, Tensor, list[Unreadable]]:
    images = [image for image, _, _ in samples if image is not None]
    labels = torch.tensor([label for _, label, _ in samples])
    unreadable = [bad for _, _, several in samples for bad in several]
    return torch.stack(images) if len(images) == len(samples) else None, labels, unreadable
