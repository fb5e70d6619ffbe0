"""A stage of the pipeline that modules in several processes make."""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from localprop.data.base import Data
from localprop.network.carry import Carry
from localprop.network.network import LocalNetwork
from localprop.parallel.job import Job
from localprop.parallel.messages import Receiver, Sender, WayBack
from localprop.parallel.placement import IN_FLIGHT, Placement
from localprop.parallel.replicas import Replicas
from localprop.parallel.timeline.traces import recorder_for, write_trace
from localprop.training.stage import Stage, Waiting
from localprop.training.state import TrainingState

_ASK_SECONDS = 0.5
T = TypeVar("T")


class PipelineStage(Stage):
    """A process that trains some of the modules: it receives from the stage before and sends to the next.

    Where a head reads ahead into the next stage, it sends a batch in the middle of its step, and waits there for the
    gradient. So there is one batch at a time between the two, and one graph in memory.

    The last one knows all losses, and reports. The first one decides when to stop: its word travels with the batches,
    so that every process stops after the same one. Replicas are pipelines side by side, each for a part of every
    batch; the first of them evaluates and writes checkpoints.

    Args:
        job: the processes.
        placement: what each of them trains.
        net: the network.
        trace: whether to record what is done when.
    """

    def __init__(self, job: Job, placement: Placement, net: LocalNetwork, trace: bool = False) -> None:
        stage, self.replica = placement.place(job.rank)
        all_replicas = [Replicas(job, placement.ranks(k)) for k in range(len(placement.stages))]
        self._replicas = all_replicas[stage] if placement.replicas > 1 else None
        super().__init__(placement.stages[stage], self._replicas.part if self._replicas else None)
        self._job, self._placement = job, placement
        self.name, self.replicas = str(placement), placement.replicas
        self._recorder = recorder_for(job) if trace else None
        self.reporter = placement.reporter
        self.reports = job.rank == self.reporter
        self._last = stage == len(placement.stages) - 1
        shared = [bool(net.local_modules[modules.start].shared) for modules in placement.stages] + [False]
        self._gives_back, self._gets_back = shared[stage : stage + 2]
        ahead = 1 if self._gives_back else IN_FLIGHT  # the one before waits for the gradient of that
        self._receiver = Receiver(job, job.rank - 1, ahead=ahead) if stage else None
        self._sender = None if self._last else Sender(job, job.rank + 1)
        self._looks = any(net.local_modules[k].local_loss.uses_inputs for k in self.modules)
        later = net.local_modules[self.modules.stop :]
        self._needed_later = {name for module in later for name in module.reads}
        self._ways_back: list[WayBack] = []
        self._way_back = self.way_back() if any(shared) else None
        self.exchange = self if self._gives_back or self._gets_back else None
        self._training = self._announced = False
        self._signal, self._asked = 0, 0.0

    @property
    def needs_inputs(self) -> bool:
        """Whether inputs are loaded here for training: where they enter, and where a loss looks at them."""
        return self._looks or self._receiver is None

    def train_batches(
        self, data: Data, epoch: int, batch_size: int, micro_batches: int, device: torch.device, steps: range
    ) -> Iterator[Carry]:
        """See `Stage.train_batches`. Inputs are loaded here where a loss looks at them, not received."""
        self._training = self._announced = True
        before = epoch * data.steps_per_epoch(batch_size)
        numbers = [before + step for step in steps for _ in range(micro_batches)]
        loaded = super().train_batches(data, epoch, batch_size, micro_batches, device, steps)
        if self._receiver is None:
            for carry in self._watched("load", loaded, numbers):
                carry.inputs = carry.inputs if self._looks else None
                yield carry
            return
        for carry in self._watched("wait", self._receiver.stream(len(numbers)), numbers):
            if self._looks:
                with self.span("load"):
                    carry.inputs = next(loaded).inputs
            yield carry

    def way_back(self) -> WayBack:
        """Opens a way from each stage to the one before it; all processes call this together."""
        rank = self._job.rank
        way = WayBack(self._job, rank - 1 if self._receiver else None, None if self._last else rank + 1)
        self._ways_back.append(way)
        return way

    def waiting(self) -> Waiting:
        """See `Stage.waiting`."""
        ends = [end for end in (self._receiver, self._sender) if end]
        tensors = [tensor for end in (*ends, *self._ways_back) for tensor in end.in_flight()]
        return Waiting(super().waiting().tensors + tensors, all(end.full for end in ends))

    def span(self, what: str, module: int | None = None) -> AbstractContextManager[Any]:
        """Records what is done inside, one of `timeline.KINDS`, where this process is to."""
        return self._recorder.span(what, module) if self._recorder else nullcontext()

    def _watched(self, what: str, batches: Iterator[T], steps: list[int]) -> Iterator[T]:
        """The micro-batches of these steps; that each of them is waited for, or loaded, is recorded as `what`."""
        if self._recorder:
            for step in steps:
                self._recorder.begin(step)
                with self.span(what):
                    batch = next(batches)
                yield batch
        yield from batches

    def test_batches(self, data: Data, batch_size: int, device: torch.device, models: int) -> Iterator[list[Carry]]:
        """See `Stage.test_batches`."""
        self._training, self._announced = False, True
        if self.replica:
            return
        with self.span("evaluate"):
            if self._receiver is None:
                yield from super().test_batches(data, batch_size, device, models)
                return
            for _ in range(-(-data.test_size // batch_size)):
                yield [self._receiver.one() for _ in range(models)]

    def send(self, carry: Carry) -> None:
        """See `Stage.send`."""
        if not (self._gets_back and self._training):
            self._send(carry)

    def give_back(self, carry: Carry) -> None:
        """See `Exchange.give_back`."""
        assert self._way_back is not None
        # In the place of what there is not, something of another shape: nothing can be sent of size 0.
        gradient = carry.features.new_zeros(()) if carry.gradient is None else carry.gradient
        scale = carry.features.new_zeros(1) if carry.scale is None else carry.scale
        carry.gradient = carry.scale = None
        with self.span("back"):
            self._way_back.send(Carry(gradient, scale, losses=carry.losses[-1:]))

    def settle(self) -> None:
        """See `Exchange.settle`."""
        assert self._way_back is not None
        self._way_back.settle()

    def hand_on(self, carry: Carry) -> None:
        """See `Exchange.hand_on`."""
        assert self._way_back is not None
        assert self._sender is not None
        self._send(carry)
        with self.span("gradient"):
            back = self._way_back.receive()
        self._sender.settle()
        carry.losses[-1:] = back.losses
        carry.gradient = back.features if back.features.dim() else None
        carry.scale = None if back.targets.dim() else back.targets

    def _send(self, carry: Carry) -> None:
        signal = self.signals.number
        if self._receiver is None:
            carry.stop = self._asked_to_stop(signal)
        elif signal and not self._signal:
            self._signal = signal
            self._job.ask_to_stop(signal)
        if self._sender:
            carry.context = {name: value for name, value in carry.context.items() if name in self._needed_later}
            with self.span("room") if self._training else nullcontext():
                self._sender.wait_for_room()
            with self.span("send") if self._training else nullcontext():
                self._sender.send(carry, self._training, self._announced)
            self._announced = not self._training  # the batches of an epoch have one form
        elif self._replicas and self._training:
            means = torch.stack([loss.float() for loss in carry.losses])
            self.average([means])
            carry.losses = list(means)

    def _asked_to_stop(self, signal: int) -> int:
        self._signal = self._signal or signal
        if not self._signal and time.monotonic() - self._asked > _ASK_SECONDS:
            self._signal, self._asked = self._job.asked_to_stop(), time.monotonic()
        if self._replicas:
            # Only one of them evaluates: nobody stops until all train again, and at the same batch.
            with self.span("replicas") if self._training else nullcontext():
                return self._replicas.highest(self._signal) if self._training else 0
        return self._signal

    def average(self, gradients: list[Tensor]) -> None:
        """Replaces a module's gradients by their mean over the replicas, in place."""
        if self._replicas:
            with self.span("replicas"):
                self._replicas.average(gradients)

    def gather(self, value: T) -> list[T]:
        """See `Stage.gather`."""
        return self._job.gather(value)

    def stop_after(self, stop: int) -> int:
        """See `Stage.stop_after`."""
        return stop

    def save(self, folder: Path, step: int, parts: dict[str, Any], meta: dict[str, Any], keep: int) -> Path:
        """See `Stage.save`; that it is saved is recorded."""
        with self.span("save"):
            return super().save(folder, step, parts, meta, keep)

    def weights(self, state: TrainingState) -> dict[str, Tensor]:
        """See `Stage.weights`."""
        weights, shares = state.evaluated.state_dict(), state.net.shares()
        for rank, modules in enumerate(self._placement.stages[:-1]):
            for name in [name for k in modules for name in shares[k]]:
                if self.reports:
                    weights[name] = self._job.receive(weights[name], rank)
                elif rank == self._job.rank:
                    self._job.send(weights[name], self.reporter)
        return weights

    def write_trace(self, names: Sequence[str], folder: Path, title: str) -> str | None:
        """Writes what all processes recorded into the run folder; all call this together.

        Args:
            names: what each process trains, by rank.
            folder: the run folder.
            title: of the picture.

        Returns:
            A line for the user, in the process that reports, if anything was recorded.
        """
        return write_trace(self._job, self._placement, self._recorder, names, folder, title) if self._recorder else None
