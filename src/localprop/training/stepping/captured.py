"""Training steps as CUDA graphs, one for each module: the same numbers without Python and launches."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from localprop.errors import ConfigError, first_line
from localprop.network.carry import Carry
from localprop.network.graphs import CapturedPass, CudaGraphPool, GraphPool, Work, borrowed, copy_of_context
from localprop.network.network import LocalNetwork
from localprop.network.phase import Phase
from localprop.network.resting import Away
from localprop.settings.config import OptimConfig, RunConfig
from localprop.training.stepping.exchange import Exchange
from localprop.training.stepping.mask import Mask
from localprop.training.stepping.steps import OptimizerSteps, forget

_WARM_UP = 2  # eager steps before the one that is captured
AHEAD = 2
"""Batches that a process of a pipeline has asked for besides the one that it trains on."""


class Training(Protocol):
    """What is needed of a `TrainingState`."""

    net: LocalNetwork
    config: OptimConfig
    modules: range
    phases: Sequence[Phase]
    mask: Mask | None
    ema: ModelEmaV3 | None
    steps: OptimizerSteps
    step: int
    exchange: Exchange | None
    away: Away | None

    def capture(self, pool: GraphPool, refuse: Callable[[str], None]) -> None: ...

    def run(self, carry: Carry, seed: int, last: bool) -> None: ...

    def run_phase(self, phase: Phase, carry: Carry, last: bool) -> None: ...

    def finish_phase(self, phase: Phase, losses: Sequence[Tensor], last: bool) -> None: ...

    def update_average(self) -> None: ...


def use_graphs(
    state: Training, config: RunConfig, device: torch.device, replicas: bool, note: Callable[[str], None]
) -> None:
    """Captures a training's steps as CUDA graphs, where the settings ask for it and it is possible.

    Args:
        state: the training.
        config: the settings.
        device: where it is.
        replicas: whether gradients are averaged over processes.
        note: shows a line to the user.

    Raises:
        ConfigError: `--cuda-graphs on`, and a step cannot be captured.
    """
    if config.cuda_graphs == "off" or device.type != "cuda":
        return

    def refuse(reason: str) -> None:
        if config.cuda_graphs == "on":
            raise ConfigError(f"--cuda-graphs on: {reason}; leave it out")
        note(f"no CUDA graphs: {reason}")

    if state.steps.offload is not None:
        refuse("--offload-optimizer moves optimizer states, and a graph needs them in one place")
    elif state.away is not None:
        refuse("--offload-boundaries moves boundaries, and a graph needs them in one place")
    elif replicas:
        refuse("replicas average their gradients, which the host does")
    elif state.exchange is not None:
        refuse("a head reads ahead into another process, and no graph waits for what comes back in its step")
    elif config.trace:
        refuse("--trace needs the host between modules")
    elif step := _checkpoint_in_the_way(state, config.checkpoint_steps):
        refuse(f"the checkpoint of step {step} waits for this process, whose capture waits for the batches after it")
    else:
        state.capture(CudaGraphPool(device), refuse)
        if state.mask is None:
            note(f"--opt {state.config.opt} steps outside the CUDA graphs: the host waits for each module")


def _checkpoint_in_the_way(state: Training, every: int | None) -> int | None:
    """The step whose checkpoint would never be saved, if one is saved every so many steps; None where there is none.

    A capture waits until the device is idle, so it waits for the batches that this process has asked for. The process
    before sends them after a checkpoint, and the checkpoint waits for all processes.
    """
    if not every or not state.modules.start:
        return None
    captured = state.step + _WARM_UP + 1
    return next((step for step in range(captured, captured + AHEAD) if step % every == 0), None)


class CapturedSteps:
    """Captures the third step that it is given, and replays it for every later one.

    The first two run eagerly, as a warm-up. In the first, optimizers make their state and kernels their workspaces. The
    second is searched for code that waits for the device, which cannot be captured. With several micro-batches there
    are two captures, one for those before the last and one for the last; gradients stay in buffers between them.

    Args:
        state: the training, whose steps are captured.
        pool: captures the graphs.
        refuse: called with the reason where steps cannot be captured; they then run eagerly.
    """

    def __init__(self, state: Training, pool: GraphPool, refuse: Callable[[str], None]) -> None:
        self._state, self._pool, self._refuse = state, pool, refuse
        self._passes: dict[bool, CapturedPass] = {}  # by whether the micro-batch is the last
        self._first: int | None = None  # the first step of the warm-up
        self._gradients: list[list[Tensor]] = [[] for _ in state.modules]
        self._refused = False

    @property
    def complete(self) -> bool:
        """Whether everything has been captured: later measurements would miss the graphs' own memory."""
        return len(self._passes) == (2 if self._state.config.micro_batches > 1 else 1)

    def run(self, carry: Carry, seed: int, last: bool) -> bool:
        """Trains on a batch, if that is possible here; returns whether it did.

        Arguments are those of `TrainingState.run`.
        """
        if self._refused:
            return False
        if self._first is None:
            self._first = self._state.step
        if self._state.step - self._first < _WARM_UP:
            with self._pool.warm_up():
                self._warm_up(carry, seed, last, search=self._state.step > self._first)
            return True
        if last not in self._passes:
            self._capture(carry, last)
        if self._refused:
            return False
        if not self._passes[last].fits(carry):
            if self._state.steps.buffers is not None:
                self._set_gradients(self._state.steps.buffers)  # other micro-batches of this step add to them
            return False
        self._passes[last].replay(carry, seed)
        if last and not self._state.mask:
            self._state.update_average()
        if self._state.modules.stop < len(self._state.net.local_modules):
            # A copy, because the next batch overwrites the graphs' outputs while the next stage still reads these.
            carry.features, carry.context = carry.features.clone(), copy_of_context(carry.context)
        return True

    def _warm_up(self, carry: Carry, seed: int, last: bool, search: bool) -> None:
        if not search:
            self._state.run(carry, seed, last)
            return
        places: list[str] = []
        for phase in self._state.phases:
            self._state.net.seed_phase(phase, seed)
            with self._pool.find_syncs() as found:
                self._state.run_phase(phase, carry, last)
            places += found
            self._state.finish_phase(phase, carry.losses, last)
        if last:
            self._state.update_average()
        if places and not self._refused:
            self._refused = True
            self._refuse(f"{places[0]} waits for the device")

    def _capture(self, carry: Carry, last: bool) -> None:
        state = self._state
        phases = state.phases
        works: list[Work] = [partial(state.run_phase, phase, last=last) for phase in phases]
        if last and state.mask and state.ema:
            works.append(lambda carry: state.update_average())

        def seed_phase(number: int, seed: int) -> None:
            if number < len(phases):
                state.net.seed_phase(phases[number], seed)

        def after_capture(number: int) -> None:
            if number < len(phases) and phases[number].done:
                self._keep_gradients(phases[number].module - state.modules.start, last)

        def after_replay(number: int, output: Carry) -> None:
            if number < len(phases) and phases[number].done and not state.mask:
                done = 0 if state.net.exact else phases[number].module - state.modules.start
                self._step_by_host(phases[number], output.losses[: done + 1], last)

        captured = CapturedPass(self._pool, works, seed_phase, after_capture, after_replay)
        try:
            self._use_buffers()
            captured.capture(carry)
        except Exception as error:  # anything: a model, a loss or an optimizer may run any code
            self._give_up(first_line(error), last)
            return
        self._passes[last] = captured

    def _use_buffers(self) -> None:
        """With several micro-batches, lets gradients add up in buffers, whose addresses the graphs know."""
        steps = self._state.steps
        if self._state.config.micro_batches == 1:
            return
        if steps.buffers is None:
            steps.buffers = [[torch.empty_like(parameter) for parameter in own] for own in steps.trained]
            for own in steps.buffers:
                forget(own)
        self._set_gradients(steps.buffers)

    def _set_gradients(self, gradients: list[list[Tensor]], i: int | None = None) -> None:
        """Gives parameters these gradients: those of all modules, or of the i-th."""
        for number, own in enumerate(self._state.steps.trained):
            if i in (None, number):
                for parameter, gradient in zip(own, gradients[number], strict=True):
                    parameter.grad = gradient

    def _remove_gradients(self, i: int) -> None:
        for parameter in self._state.steps.parameters[i]:
            parameter.grad = None

    def _keep_gradients(self, i: int, last: bool) -> None:
        """Takes the gradients that the i-th module has after its capture; keeps them where the host has to step it."""
        steps = self._state.steps
        if steps.buffers is not None:
            self._gradients[i] = steps.buffers[i]
        elif last and not self._state.mask:
            steps.trained[i] = [parameter for parameter in steps.parameters[i] if parameter.grad is not None]
            # Their memory is free for the next module, whose graph starts after the host has stepped this one.
            self._gradients[i] = [borrowed(p.grad) for p in steps.trained[i] if p.grad is not None]
        self._remove_gradients(i)

    def _step_by_host(self, phase: Phase, losses: Sequence[Tensor], last: bool) -> None:
        i = phase.module - self._state.modules.start
        if last:
            self._set_gradients(self._gradients, i)
        try:
            self._state.finish_phase(phase, losses, last)
        finally:
            self._remove_gradients(i)

    def _give_up(self, reason: str, last: bool) -> None:
        """Returns to the state before a capture that failed; it has computed nothing."""
        self._refused = True
        steps = self._state.steps
        torch.clear_autocast_cache()
        steps.reset_scalers()
        for i in range(len(self._state.modules)):
            self._remove_gradients(i)
        if steps.buffers is not None and False in self._passes:
            self._set_gradients(steps.buffers)  # the sums of this step's earlier micro-batches
        steps.buffers = None
        self._passes.clear()
        self._refuse(f"a step cannot be captured ({reason})")
