"""What the trainer sees of a dataset."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from localprop.data.transfer import on_device
from localprop.data.view import CROPPED, View, evaluation_record, read_evaluation
from localprop.errors import DataError
from localprop.seeding import derive_seed, generator
from localprop.settings.config import DataConfig
from localprop.tasks.base import Batch, Task

Pixels = tuple[Tensor, Tensor]


class Store(Protocol):
    """Where pixels come from. Images are (batch, 3, side, side) on the device, in 0..255, uint8 or float32.

    Labels are (batch,), int64, on the device. Test images are those to evaluate on, held-out ones included.
    """

    train_size: int
    test_size: int
    img_size: int
    skipped: list[str]
    view: View  # how images are evaluated where nothing else has been recorded

    @property
    def held_bytes(self) -> int:
        """Bytes that lie on a GPU for good."""
        ...

    def release(self) -> None:
        """Frees images that are held: nobody will ask for any."""
        ...

    def testing_on(self, other: Any) -> "Store":
        """The same store with the test images of another of its kind."""
        ...

    def train(
        self, epoch: int, order: list[int], batch_size: int, steps: range, device: torch.device
    ) -> Iterator[Pixels]:
        """Augmented batches number `steps` of the epoch whose images come in this `order`."""
        ...

    def test(self, batch_size: int, device: torch.device, view: View) -> Iterator[Pixels]:
        """All test images in order, as `view` shows them; the last batch may be small."""
        ...


@dataclass(frozen=True)
class Data:
    """A dataset to train on and to evaluate with.

    Args:
        name: name of the dataset, or of its folder.
        classes: names of the classes, in the order of their labels.
        img_size: side of the square images in pixels.
        mean, std: of the channels red, green and blue, in 0..1; what images are normalised with.
        store: where pixels come from.
        task: what a network is trained for on them; it prepares the batches.
        config: for what the test images are.
        seed: of order, augmentation and mixing.
        identity: see `localprop.data.identity`; the same wherever the data lie.
        view: how images are evaluated.
        notes: lines for the user, such as what was passed over.
        final_store: where the pixels of `final` come from.
    """

    name: str
    classes: list[str]
    img_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    store: Store
    task: Task
    config: DataConfig
    seed: int
    identity: dict[str, Any]
    view: View
    notes: list[str] = field(default_factory=list)
    final_store: Store | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def train_size(self) -> int:
        """Number of training images."""
        return self.store.train_size

    @property
    def evaluated_on(self) -> Literal["test", "validation"]:
        """What `test_size` and `test_batches` speak of: test images, or those to choose settings by."""
        return "validation" if self.config.val_split or self.final_store else "test"

    def testing_early(self) -> "Data":
        """The same data, with the test images of `final` for those that are evaluated during training."""
        if self.final_store is None:
            return self
        return replace(self, store=self.store.testing_on(self.final_store), final_store=None)

    @property
    def final(self) -> "Data | None":
        """The test images that are looked at once, after training, where others are evaluated during it."""
        return replace(self, store=self.final_store, final_store=None) if self.final_store else None

    @property
    def test_size(self) -> int:
        """Number of images to evaluate on."""
        return self.store.test_size

    @property
    def evaluation(self) -> dict[str, Any]:
        """What a network sees of an evaluated image: for run.json, and for exports."""
        return evaluation_record(self.img_size, self.mean, self.std, self.view)

    def evaluated_as(self, record: Any) -> "Data":
        """The same data, evaluated as a `Data.evaluation` says that was recorded.

        Raises:
            ValueError: it is damaged, or of another image size.
        """
        size, mean, std, view = read_evaluation(record)
        if size != self.img_size:
            raise ValueError(f"input_size is {size}, and images have {self.img_size} pixels a side")
        return replace(self, mean=mean, std=std, view=view)

    def as_trained(self, settings: Mapping[str, Any]) -> "Data":
        """The same data, shown to a network as the weights expect it that it starts from.

        Args:
            settings: timm's `pretrained_cfg` of the weights. What it lacks, or says badly, stays as it was. Its crop
                and interpolation are for images that are larger than the input.
        """
        record = {**self.evaluation}
        wanted = {"mean", "std"} | ({"crop_pct", "crop_mode", "interpolation"} if self.view == CROPPED else set())
        for key in wanted & set(settings):
            value = settings[key]
            record[key] = list(value) if isinstance(value, (list, tuple)) else value
        try:
            return self.evaluated_as(record)
        except ValueError:
            return self

    @property
    def skipped(self) -> list[str]:
        """Paths of the unreadable training images that were met so far."""
        return self.store.skipped

    @property
    def held_bytes(self) -> int:
        """Bytes of the dataset that lie on a GPU for good: no part of what a training step takes."""
        return self.store.held_bytes + (self.final_store.held_bytes if self.final_store else 0)

    def release(self) -> None:
        """Frees images that are held in memory, in a process that needs none; sizes stay known."""
        for store in (self.store, self.final_store):
            if store:
                store.release()

    def steps_per_epoch(self, batch_size: int) -> int:
        """Number of training batches in an epoch; a last partial batch is dropped.

        Raises:
            DataError: there are fewer images than one batch takes.
            ConfigError: the task takes no batches of this size.
        """
        if batch_size > self.train_size:
            raise DataError(
                f"{self.name} has {self.train_size} training images, fewer than one batch of {batch_size}; "
                f"lower --batch-size"
            )
        self.task.check(batch_size)
        return self.train_size // batch_size

    def train_batches(self, epoch: int, batch_size: int, device: torch.device | str, start: int = 0) -> Iterator[Batch]:
        """The training batches of an epoch, from batch number `start` on.

        A batch is a pure function of (seed, epoch, its number): those after a restart equal the uninterrupted
        ones bit for bit, and the global random states are as the caller left them.

        Returns:
            Iterator of [inputs, targets], as the task prepares them: of images (batch, 3, img_size, img_size), float32,
            normalised, and labels (batch,) int64. Who empties the list holds the only references.

        Raises:
            DataError: at once as `steps_per_epoch`; while iterating, when more training images are unreadable
                than the config allows.
            ConfigError: as `steps_per_epoch`.
        """
        steps = range(start, self.steps_per_epoch(batch_size))
        return self._train_batches(epoch, batch_size, steps, torch.device(device))

    def test_batches(self, batch_size: int, device: torch.device | str) -> Iterator[Batch]:
        """All images to evaluate on in order; the last batch may be small.

        Returns:
            Iterator of [inputs, targets], as `train_batches` gives them.

        Raises:
            DataError: an image is unreadable.
        """
        device = torch.device(device)
        mean, std = self._normalisation(device)
        for number, (images, labels) in enumerate(self.store.test(batch_size, device, self.view)):
            batch = [images.float().sub(mean).div_(std), labels]
            yield self.task.prepare(batch, derive_seed(self.seed, "test", number), training=False)

    def _train_batches(self, epoch: int, batch_size: int, steps: range, device: torch.device) -> Iterator[Batch]:
        order = torch.randperm(self.train_size, generator=generator(derive_seed(self.seed, "order", epoch)))
        mean, std = self._normalisation(device)
        batches = self.store.train(epoch, order.tolist(), batch_size, steps, device)
        for step in steps:
            images, labels = next(batches)
            batch = [images.float().sub(mean).div_(std), labels]
            del images, labels
            yield self.task.prepare(batch, derive_seed(self.seed, "mix", epoch, step), training=True)

    def _normalisation(self, device: torch.device) -> tuple[Tensor, Tensor]:
        mean, std = on_device(torch.tensor([self.mean, self.std]), device).mul(255).view(2, 3, 1, 1)
        return mean, std
