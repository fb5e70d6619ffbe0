"""The seam between training alone and in several processes: where batches come from and go, and what others know."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from localprop.data.base import Data
from localprop.network.carry import Carry
from localprop.tasks.base import Batch, share_of_step
from localprop.training.checkpoints.saving import begin_checkpoint, publish, write_parts
from localprop.training.signals import StopSignals
from localprop.training.state import TrainingState
from localprop.training.stepping.exchange import Exchange

T = TypeVar("T")


class Waiting(NamedTuple):
    """Batches that a process holds beside the one that it works on."""

    tensors: list[Tensor]
    most: bool
    """Whether as many wait as ever will."""


class Finish(NamedTuple):
    """What trains the last epochs of a run in the place of what trains those before.

    Attributes:
        first: the step after which it begins, which ends an epoch.
        build: gives its state, as new; it is given the moving average so far.
    """

    first: int
    build: Callable[[ModelEmaV3 | None], TrainingState]


class Stage:
    """A process that trains alone: it has all modules, batches come from the data, and nobody else is asked.

    A stage trains consecutive modules; stages one after the other train all of them. A process of several overrides
    what stands between the two comments below (`localprop.parallel.pipeline.PipelineStage`); all else is the same code
    in every layout.

    Args:
        modules: those that are trained here.
        own_part: gives of a loaded batch [inputs, targets] what this process trains on; default: all.

    Attributes:
        name: of the layout, for messages.
        replica: which of several processes this is that train the same modules, each on a part of every batch.
        replicas: how many they are.
        reporter: the process that knows all losses, and so writes results and shows progress.
        reports: whether this is the reporter.
        signals: those that come to this process while it trains.
        exchange: what is exchanged in the middle of a step; None where no head reads ahead across processes.
    """

    name = "1 process"
    replica, replicas = 0, 1
    reporter, reports = 0, True
    exchange: Exchange | None = None

    def __init__(self, modules: range, own_part: Callable[[Batch], Batch] | None = None) -> None:
        self.modules = modules
        self._own_part = own_part
        self.signals = StopSignals()
        self._batch: list[Tensor] = []  # whose micro-batches are being trained on

    # Batches: one of several processes receives them from the stage before, and sends them to the next. Where a head
    # reads ahead, its gradient goes one hop back, to the stage before (`exchange`).

    def train_batches(
        self, data: Data, epoch: int, batch_size: int, micro_batches: int, device: torch.device, steps: range
    ) -> Iterator[Carry]:
        """The batches of an epoch with the numbers `steps`, each as so many micro-batches, as they come to the first
        module here.
        """
        for batch in islice(data.train_batches(epoch, batch_size, device, steps.start), len(steps)):
            total = data.task.weight(batch[1])
            share = partial(share_of_step, data.task, total, micro_batches * self.replicas)
            self._batch = self._own_part(batch) if self._own_part else batch
            del batch  # or else the parts of others would stay in memory
            yield from Carry.micro_batches(self._batch, micro_batches, share)

    def test_batches(self, data: Data, batch_size: int, device: torch.device, models: int) -> Iterator[list[Carry]]:
        """The batches to evaluate on, each once for every one of the `models` that are evaluated."""
        for inputs, targets in data.test_batches(batch_size, device):
            yield [Carry(inputs, targets) for _ in range(models)]

    def send(self, carry: Carry) -> None:
        """Hands a batch to the next stage, unless that was done in its step already.

        Where this process reports, the batch then has the losses to report.
        """

    def waiting(self) -> Waiting:
        """Batches that have been loaded or received ahead, or been sent and may not have arrived."""
        return Waiting(self._batch, most=True)

    # News: what processes tell each other beside batches.

    def gather(self, value: T) -> list[T]:
        """What each process gives, by rank; all call this together. Values are such as JSON has."""
        return [value]

    def stop_after(self, stop: int) -> int:
        """The number of the signal after which every process stops, once it has sent a batch; 0 to continue.

        Args:
            stop: the batch's `Carry.stop`.
        """
        return self.signals.number

    def weights(self, state: TrainingState) -> dict[str, Tensor]:
        """The evaluated backbone's state dict, where this process reports; else some of it."""
        return state.evaluated.state_dict()

    # The same in every layout.

    def save(self, folder: Path, step: int, parts: dict[str, Any], meta: dict[str, Any], keep: int) -> Path:
        """Saves a checkpoint of all processes, which come here after the same step, with nothing on its way.

        Arguments are those of `save_checkpoint`; `meta` is that of the process that reports.

        Returns:
            The checkpoint's folder, in the process that reports.
        """
        # One process makes the folder, whose name nobody can guess, and tells the others.
        aside = folder / self.from_reporter(begin_checkpoint(folder, step).name if self.reports else "")
        written = self.gather({} if self.replica else write_parts(aside, step, parts))
        path = folder
        if self.reports:
            checksums = {name: digest for own in written for name, digest in own.items()}
            path = publish(aside, step, checksums, meta, keep)
        self.gather(None)  # nobody continues before it is published
        return path

    def from_reporter(self, value: T) -> T:
        """What the process that reports gives."""
        return self.gather(value)[self.reporter]

    def agree(self, reason: str | None) -> str | None:
        """Why some process cannot take a checkpoint over, whose `reason` is given; None if all can."""
        return next((other for other in self.gather(reason) if other), None)

    def highest(self, peak: int | None) -> int | None:
        """The largest `peak` memory of a process, in bytes; None if none is known."""
        return max(filter(None, self.gather(peak)), default=None)
