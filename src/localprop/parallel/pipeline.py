"""A stage of the pipeline that modules in several processes make."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localprop.checkpoint import publish, write_parts
from localprop.data import Data
from localprop.network import Carry, LocalNetwork
from localprop.parallel.job import Job
from localprop.parallel.messages import Receiver, Sender
from localprop.stage import Stage
from localprop.state import TrainingState

_ASK_SECONDS = 0.5


class PipelineStage(Stage):
    """A process that trains some of the modules: process k receives from k-1 and sends to k+1.

    The last one knows all losses, and reports. The first one decides when to stop: its word travels with the batches,
    so that every process stops behind the same one.

    Args:
        job: the processes.
        layout: the modules of each.
        net: the network.
    """

    def __init__(self, job: Job, layout: list[range], net: LocalNetwork) -> None:
        super().__init__(layout[job.rank])
        self._job, self._layout = job, layout
        self.reports = job.rank == job.size - 1
        self._receiver = Receiver(job, job.rank - 1) if job.rank else None
        self._sender = None if self.reports else Sender(job, job.rank + 1)
        self._looks = any(net.local_modules[k].auxiliary.uses_images for k in self.modules)
        later = net.local_modules[self.modules.stop :]
        self._wanted = {name for module in later for name in module.reads}
        self._training = self._announced = False
        self._signal, self._asked = 0, 0.0

    @property
    def needs_images(self) -> bool:
        """Whether images are loaded here for training: where they enter, and where a loss looks at them."""
        return self._looks or self._receiver is None

    def train_batches(
        self, data: Data, epoch: int, batch_size: int, device: torch.device, start: int
    ) -> Iterator[Carry]:
        """See `Stage.train_batches`. Images are loaded here where a loss looks at them, not received."""
        self._training = self._announced = True
        if self._receiver is None:
            for carry in super().train_batches(data, epoch, batch_size, device, start):
                carry.images = carry.images if self._looks else None
                yield carry
            return
        own = data.train_batches(epoch, batch_size, device, start) if self._looks else None
        for carry in self._receiver.stream(data.steps_per_epoch(batch_size) - start):
            if own:
                carry.images = next(own).pop(0)
            yield carry

    def test_batches(self, data: Data, batch_size: int, device: torch.device, models: int) -> Iterator[list[Carry]]:
        """See `Stage.test_batches`."""
        self._training, self._announced = False, True
        if self._receiver is None:
            yield from super().test_batches(data, batch_size, device, models)
            return
        for _ in range(-(-data.test_size // batch_size)):
            yield [self._receiver.one() for _ in range(models)]

    def send(self, carry: Carry, signal: int) -> None:
        """See `Stage.send`."""
        if self._receiver is None:
            carry.stop = self._asked_to_stop(signal)
        elif signal and not self._signal:
            self._signal = signal
            self._job.ask_to_stop(signal)
        if self._sender:
            carry.context = {name: value for name, value in carry.context.items() if name in self._wanted}
            self._sender.send(carry, self._training, self._announced)
            self._announced = not self._training  # the batches of an epoch have one form

    def _asked_to_stop(self, signal: int) -> int:
        self._signal = self._signal or signal
        if not self._signal and time.monotonic() - self._asked > _ASK_SECONDS:
            self._signal, self._asked = self._job.asked_to_stop(), time.monotonic()
        return self._signal

    def stopping(self, carry: Carry, signal: int) -> int:
        """See `Stage.stopping`."""
        return carry.stop

    def save(self, folder: Path, step: int, parts: dict[str, Any], meta: dict[str, Any], keep: int) -> Path:
        """See `Stage.save`. All processes come here behind the same step, with nothing in flight."""
        written = self._job.gather(write_parts(folder, step, parts))
        path = folder
        if self.reports:
            path = publish(folder, step, {name: own[name] for own in written for name in own}, meta, keep)
        self._job.wait_for_all()
        return path

    def highest(self, peak: int | None) -> int | None:
        """See `Stage.highest`."""
        return max(filter(None, self._job.gather(peak)), default=None)

    def weights(self, state: TrainingState) -> dict[str, Tensor]:
        """See `Stage.weights`."""
        weights, shares = state.evaluated.state_dict(), state.net.shares()
        for rank, modules in enumerate(self._layout[:-1]):
            for name in [name for k in modules for name in shares[k]]:
                if self.reports:
                    weights[name] = self._job.receive(weights[name], rank)
                elif rank == self._job.rank:
                    self._job.send(weights[name], self._job.size - 1)
        return weights
