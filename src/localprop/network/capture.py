"""A network's backward pass as CUDA graphs, for training loops of one's own."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from localprop.errors import ConfigError, first_line
from localprop.network.carry import Carry
from localprop.network.graphs import CapturedPass, GraphPool
from localprop.network.output import LocalOutput
from localprop.network.phase import Phase


class Network(Protocol):
    """What is needed of a `LocalNetwork`; see there."""

    local_modules: Any

    @property
    def phases(self) -> tuple[Phase, ...]: ...

    @property
    def loss_count(self) -> int: ...

    def seed_of_batch(self, seed: int | None) -> AbstractContextManager[int | None]: ...

    def seed_phase(self, phase: Phase, seed: int) -> None: ...

    def run_phase(self, phase: Phase, carry: Carry, scaler: torch.amp.GradScaler | None) -> Tensor | None: ...

    def note_prediction(self, predictions: list[Tensor | None], phase: Phase, prediction: Tensor | None) -> None: ...


class CapturedBackward:
    """`LocalNetwork.backward`, captured in the second call and replayed from then on; see `LocalNetwork.capture`.

    All batches must have the same shapes, types and devices.
    """

    def __init__(
        self,
        net: Network,
        pool: GraphPool,
        after_module: Callable[[int, Tensor], None] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self._net, self._pool = net, pool
        self._after_module, self._scaler = after_module, scaler
        self._predictions: list[Tensor | None] = [None] * net.loss_count
        self._phases = net.phases
        works = [partial(self._train, phase) for phase in self._phases]
        self._pass = CapturedPass(pool, works, lambda number, seed: net.seed_phase(self._phases[number], seed))
        self._calls = 0

    def __call__(self, inputs: Tensor, targets: Tensor, *, seed: int | None = None) -> LocalOutput:
        """Trains on a batch.

        Args:
            inputs: see `LocalNetwork.backward`; from the second call on they are copied.
            targets: likewise.
            seed: likewise.

        Returns:
            Losses and predictions. The next call overwrites the predictions: copy what you want to keep.

        Raises:
            ConfigError: the step does something that cannot be captured, it leaves gradients, or a batch is unlike the
                captured one.
        """
        carry = Carry(inputs, targets, inputs)
        del inputs, targets
        with self._net.seed_of_batch(seed) as own:
            self._run(carry, own)
        return LocalOutput(torch.stack([loss.float() for loss in carry.losses]), list(self._predictions))

    def _run(self, carry: Carry, seed: int | None) -> None:
        self._calls += 1
        if self._calls == 1:
            with self._pool.warm_up(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*capturable=True")  # torch warns that nothing is captured yet
                for phase in self._phases:
                    if seed is not None:
                        self._net.seed_phase(phase, seed)
                    self._train(phase, carry)
        else:
            if self._calls == 2:
                self._capture(carry)
            if not self._pass.fits(carry):
                raise ConfigError("this batch has other shapes or types than the captured one; call backward for it")
            self._pass.replay(carry, seed)

    def _capture(self, carry: Carry) -> None:
        modules = self._net.local_modules
        without = [own for module in modules for own in module.parameters() if own.grad is None]
        try:
            self._pass.capture(carry)
        except RuntimeError as error:
            self._calls = 1
            raise ConfigError(
                f"the step cannot be captured as CUDA graphs ({first_line(error)}); keep what it does on the device, "
                "or call backward"
            ) from error
        if any(parameter.grad is not None for parameter in without):
            self._calls = 1
            for parameter in without:
                parameter.grad = None
            # Their memory is the graphs': after the caller sets them to None, no replay would bring them back.
            raise ConfigError(
                "a captured step leaves gradients; give capture an after_module that steps the module's optimizer and "
                "sets its gradients to None, or call backward"
            )

    def _train(self, phase: Phase, carry: Carry) -> None:
        self._net.note_prediction(self._predictions, phase, self._net.run_phase(phase, carry, self._scaler))
        if self._after_module and phase.done:
            self._after_module(phase.module, carry.losses[-1])
