"""What training takes of memory, measured while it goes on."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch

from localprop.data.base import Data
from localprop.memory.measure import measured
from localprop.network.carry import Carry
from localprop.training.stage import Stage
from localprop.training.state import TrainingState


class Gauge:
    """Measures the peak memory of training steps: on CUDA of all; elsewhere, where it takes time, of few.

    These are the second step, when optimizers have their state, and the first in which as much is in flight between
    processes as may be.

    Args:
        state: the network, on its device, and its optimizers.
        stage: which modules are trained in this process.
        device: where the network is.
        micro_batches: those of a step.
        data: what is trained on; what it holds on the device is not training's.

    Attributes:
        peak: the largest number of bytes in use so far; None before anything has been measured.
    """

    def __init__(
        self, state: TrainingState, stage: Stage, device: torch.device, micro_batches: int, data: Data
    ) -> None:
        self._state, self._stage, self._device, self._data = state, stage, device, data
        self._micro_batches = micro_batches
        self.peak: int | None = None
        self._steps = 0  # since the start of this process
        self._settled = False  # whether the most has been measured

    @contextmanager
    def on(self, carry: Carry, part: int) -> Iterator[Carry]:
        """Measures, where that is due, the training on a micro-batch.

        Args:
            carry: the micro-batch; it is as after training in the end.
            part: its number in the step, from 0.

        Yields:
            The one to train on.
        """
        self._steps += part == 0
        if not self._due(part):
            yield carry
            return
        held = chain(*self._state.tensors().values(), self._stage.held, self._stage.in_flight())
        own, earlier = carry, []
        with measured(held, self._device) as measurement:
            if self._device.type != "cuda":
                # To be seen, what ends inside has to begin inside; and what began before may not end inside.
                own, earlier = carry.clone(), self._state.renew_gradients()
            yield own
        vars(carry).update(vars(own))
        del earlier
        self.peak = max(self.peak or 0, measurement.peak - self._data.held_bytes)

    def _due(self, part: int) -> bool:
        if self._device.type == "cuda":
            return True
        # The most is in use either in a micro-batch that finds all gradients and leaves them, or in the last.
        if self._settled or self._steps < 2 or part < self._micro_batches - 2:
            return False
        self._settled = self._stage.full and part + 1 == self._micro_batches
        return self._stage.full or self._steps == 2
