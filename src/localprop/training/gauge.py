"""Measures the memory of training while it runs."""

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor

from localprop.data.base import Data
from localprop.memory.measure import measured
from localprop.network.carry import Carry
from localprop.training.stage import Stage
from localprop.training.state import TrainingState


class Gauge:
    """Measures the peak memory of training steps: on CUDA of all; elsewhere, where it takes time, of few.

    These are the second step, when optimizers have their state, and the first in which as many batches wait between
    processes as ever will.

    Args:
        state: the network, on its device, and its optimizers.
        stage: which modules are trained in this process.
        device: where the network is.
        micro_batches: those of a step.
        data: what is trained on; what it holds on the device is not training's.

    Attributes:
        peak: the largest number of bytes in use so far; None before anything has been measured. Of CUDA graphs it is
            that of their capture: replays use the memory that the capture allocated.
        reserved: the largest number of bytes that PyTorch has held on the device so far, in use or not; None elsewhere
            than on CUDA.
    """

    def __init__(
        self, state: TrainingState, stage: Stage, device: torch.device, micro_batches: int, data: Data
    ) -> None:
        self._stage, self._device, self._data = stage, device, data
        self._micro_batches = micro_batches
        self.peak: int | None = None
        self.reserved: int | None = None
        self.follow(state)

    def follow(self, state: TrainingState) -> None:
        """From now on measures the training of this state; the peak is the largest of all so far."""
        self._state = state
        self._steps = 0  # of it, in this process
        self._settled = False  # whether the most has been measured

    def watch(self, carry: Carry, number: int, train: Callable[[Carry], object]) -> Carry:
        """Trains on a micro-batch, and measures that where it is due.

        Args:
            carry: the micro-batch, which is not to be used after this.
            number: its number in the step, from 0.
            train: trains on a micro-batch.

        Returns:
            The micro-batch as training has left it: `carry`, or a copy of it that was trained on instead.
        """
        self._steps += number == 0
        if not self._due(number):
            train(carry)
            return carry
        own, earlier = carry, []
        # On CUDA the allocator itself knows what there is.
        before = [] if self._device.type == "cuda" else self._existing()
        with measured(before, self._device) as measurement:
            if self._device.type != "cuda":
                # To be seen, what ends inside has to begin inside; and what began before may not end inside.
                own, earlier = carry.clone(), self._state.renew_gradients()
            train(own)
        del earlier
        self.peak = max(self.peak or 0, measurement.peak - self._data.held_bytes)
        return own

    def note_reserved(self) -> None:
        """Notes how much memory PyTorch holds on the device."""
        if self._device.type == "cuda":
            self.reserved = max(self.reserved or 0, torch.cuda.max_memory_reserved(self._device))

    def _existing(self) -> list[Tensor]:
        return [*chain(*self._state.tensors().values()), *self._stage.waiting().tensors]

    def _due(self, number: int) -> bool:
        if self._device.type == "cuda":
            return not (self._state.captured and self._state.captured.complete)
        # The most is in use either in a micro-batch that finds all gradients and leaves them, or in the last.
        if self._settled or self._steps < 2 or number < self._micro_batches - 2:
            return False
        most = self._stage.waiting().most
        self._settled = most and number + 1 == self._micro_batches
        return most or self._steps == 2
