"""The part of a pipeline that this process is: which modules it trains, where batches come from and where they go."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localprop.data.base import Data
from localprop.network.carry import Carry
from localprop.training.checkpoint import save_checkpoint
from localprop.training.state import TrainingState


class Stage:
    """A process that trains all modules: batches come from the data, and go nowhere.

    `localprop.parallel` has one for processes that train some of the modules each.

    Args:
        modules: those that are trained here.

    Attributes:
        held: the batch whose micro-batches are being trained on, where there are several.
        name: of the layout, for messages.
        replica: which of several processes this is that train the same modules, each on a part of every batch.
        replicas: how many they are.
        reports: whether this is the process that knows all losses, and so writes results and shows progress.
    """

    name = "1 process"
    replica, replicas = 0, 1
    reports = True

    def __init__(self, modules: range) -> None:
        self.modules = modules
        self.held: list[Tensor] = []

    def train_batches(
        self, data: Data, epoch: int, batch_size: int, parts: int, device: torch.device, steps: range
    ) -> Iterator[Carry]:
        """The batches of an epoch with the numbers `steps`, each as `parts` micro-batches, as they come to the first
        module here.
        """
        batches = self._loaded(data.train_batches(epoch, batch_size, device, steps.start))
        for batch in islice(batches, len(steps)):
            self.held = batch
            yield from Carry.micro_batches(batch, parts)

    def _loaded(self, batches: Iterator[list[Tensor]]) -> Iterator[list[Tensor]]:
        """What this process takes of batches [images, labels] that it has loaded."""
        return batches

    def test_batches(self, data: Data, batch_size: int, device: torch.device, models: int) -> Iterator[list[Carry]]:
        """The batches to evaluate on, each once for every one of the `models` that are evaluated."""
        for images, labels in data.test_batches(batch_size, device):
            yield [Carry(images, labels) for _ in range(models)]

    def send(self, carry: Carry, signal: int) -> None:
        """Hands a batch to the next stage; `signal` is the number of one that came to this process, or 0.

        Where this process reports, the batch has the losses to report then.
        """

    def in_flight(self) -> list[Tensor]:
        """What has been received ahead, or been sent and is not known to be taken."""
        return []

    @property
    def full(self) -> bool:
        """Whether as much is in flight as may be."""
        return True

    def doing(self, what: str, module: int | None = None) -> AbstractContextManager[Any]:
        """Records what is done inside, one of `timeline.KINDS`, where this process is to."""
        return nullcontext()

    def average(self, gradients: list[Tensor]) -> None:
        """Replaces a module's gradients by their mean over the replicas, in place."""

    def stopping(self, stop: int, signal: int) -> int:
        """The number of the signal after which every process stops behind this batch, whose `Carry.stop` is given; 0 to
        go on.
        """
        return signal

    def save(self, folder: Path, step: int, parts: dict[str, Any], meta: dict[str, Any], keep: int) -> Path:
        """Saves a checkpoint of all stages; arguments as of `save_checkpoint`, `meta` being that of who reports."""
        return save_checkpoint(folder, step, parts, meta, keep)

    def agree(self, reason: str | None) -> str | None:
        """Why some process cannot take a checkpoint over, whose `reason` is given; None if all can."""
        return reason

    def shared(self, names: list[str]) -> list[str]:
        """The names that the process which reports has: another may not see the same files yet."""
        return names

    def highest(self, peak: int | None) -> int | None:
        """The largest `peak` memory of a process, in bytes; None if none is known."""
        return peak

    def weights(self, state: TrainingState) -> dict[str, Tensor]:
        """The evaluated backbone's state dict, where this process reports; else some of it."""
        return state.evaluated.state_dict()
