"""Writes down the losses of each step when they have arrived from the device."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from localprop.report.progress import Progress
from localprop.training.gauge import Gauge
from localprop.training.outputs import Outputs
from localprop.training.position import Clock, Position
from localprop.training.state import TrainingState
from localprop.training.stepping.delayed import Delayed

_ON_THEIR_WAY = 8  # most steps whose numbers have not arrived, where the host does not wait


class _Place(NamedTuple):
    """A step: its number in the run, its epoch, and its number there, each from 1."""

    step: int
    epoch: int
    batch: int


class StepRecords:
    """Writes down losses, and ends a run whose losses or gradients are not finite.

    Args:
        state: what is trained.
        reports: whether this process writes losses down; else it only reads its mask.
        outputs: the files of the run folder.
        gauge: measures memory.
        clock: measures the time of steps.
        device: where the network is.
        predicted: predicted peak memory of a step in bytes.

    Attributes:
        progress: shows steps to the user.
    """

    def __init__(
        self,
        state: TrainingState,
        reports: bool,
        outputs: Outputs,
        gauge: Gauge,
        clock: Clock,
        device: torch.device,
        predicted: int | None,
    ) -> None:
        self._state, self._reports, self._outputs, self._gauge, self._clock = state, reports, outputs, gauge, clock
        self._predicted = predicted
        self._numbers: Delayed[_Place] = Delayed(device, _ON_THEIR_WAY if state.delayed else 0)
        self.progress: Progress | None = None

    def add(self, position: Position, losses: Tensor) -> None:
        """Adds a step that has been started: (K,) losses, and the position of the run after it.

        Raises:
            NonFiniteLossError: something was not finite in a step whose numbers have arrived.
        """
        mask = self._state.mask
        if self._reports or mask:
            place = _Place(self._state.step, position.epoch + 1, position.batch)
            self._numbers.add(place, losses if mask is None else torch.cat([losses, mask.flags]))
        self._write(position, self._numbers.arrived())

    def finish(self, position: Position) -> None:
        """Waits for the numbers of all steps so far; arguments and errors as of `add`."""
        self._write(position, self._numbers.rest())

    def _write(self, position: Position, steps: Iterable[tuple[_Place, list[float]]]) -> None:
        flags = 0 if self._state.mask is None else len(self._state.mask.flags)
        for place, numbers in steps:
            losses = numbers[: len(numbers) - flags]
            if flags and (problem := self._state.problem(losses, numbers[-flags:], place.step)):
                raise problem
            if not self._reports:
                continue
            position.add_losses(losses)
            self._outputs.add_step(place.step, losses, *self._clock.lap(position, training=True))
            if self.progress:
                peak = self._gauge.peak or self._predicted or 0
                self.progress.step(place.epoch, place.batch, losses, peak)
