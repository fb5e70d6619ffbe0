"""Writes down the losses of each step when they have arrived from the device."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from localprop.report.progress import Progress
from localprop.report.results import EpochRow
from localprop.training.gauge import Gauge
from localprop.training.outputs import Outputs
from localprop.training.position import Clock, Position
from localprop.training.scores import Scores
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
        self._reports, self._outputs, self._gauge, self._clock = reports, outputs, gauge, clock
        self._predicted, self._device = predicted, device
        self.progress: Progress | None = None
        self.follow(state)

    def follow(self, state: TrainingState) -> None:
        """From now on writes down the steps of this state; those of the one before are finished."""
        self._state = state
        self._numbers: Delayed[_Place] = Delayed(self._device, _ON_THEIR_WAY if state.delayed else 0)

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

    def row(self, position: Position, scores: Scores | None, steps_per_epoch: int, batch_size: int) -> EpochRow:
        """What an epoch came to, or its part before the run's last step.

        Args:
            position: of the run, at its end.
            scores: those of an evaluation; None where none was due.
            steps_per_epoch: steps of an epoch.
            batch_size: examples of a step.
        """
        steps, task = position.batch or steps_per_epoch, self._state.net.task
        return EpochRow(
            epoch=position.epoch + (position.batch > 0),
            step=self._state.step,
            lr=self._state.lr,
            train_losses=tuple(total / steps for total in position.loss_sums),
            heads=scores.heads if scores else (None,) * len(position.loss_sums),
            network=scores.network if scores else (None,) * len(task.measures),
            examples_per_second=steps * batch_size / position.epoch_seconds,
            predicted_memory=self._predicted,
            peak_memory=self._gauge.peak,
            seconds=position.seconds,
            measures=tuple(task.measures),
            unit=task.unit,
        )

    def _write(self, position: Position, steps: Iterable[tuple[_Place, list[float]]]) -> None:
        flags = 0 if self._state.mask is None else len(self._state.mask.flags)
        for place, numbers in steps:
            losses = numbers[: len(numbers) - flags]
            if flags and (problem := self._state.problem(losses, numbers[-flags:], place.step)):
                raise problem
            if not self._reports:
                continue
            # In a finish the network alone has a loss, in the columns of the modules before it.
            losses = [math.nan] * (self._outputs.curve.modules - len(losses)) + losses
            position.add_losses(losses)
            self._outputs.add_step(place.step, losses, *self._clock.lap(position, training=True))
            if self.progress:
                peak = self._gauge.peak or self._predicted or 0
                self.progress.step(place.epoch, place.batch, losses, peak)
