"""What changes while a network is trained: weights, optimizers, learning rates, loss scale, moving average."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from localprop.errors import NonFiniteLossError
from localprop.memory.measure import plain_tensors
from localprop.network.carry import Carry
from localprop.network.graphs import GraphPool
from localprop.network.network import LocalNetwork
from localprop.network.phase import Phase
from localprop.network.resting import Away, to_host
from localprop.network.turns import turns
from localprop.settings.config import OptimConfig
from localprop.system.reading import Malformed
from localprop.training.checkpoints.parts import load_part, part_name, part_of
from localprop.training.checkpoints.restoring import check_part
from localprop.training.optimizers import RatesOnDevice, create_optimizers, create_scheduler, masks_its_step
from localprop.training.stepping.captured import CapturedSteps
from localprop.training.stepping.exchange import Exchange
from localprop.training.stepping.mask import Mask
from localprop.training.stepping.moving_average import AverageOnDevice
from localprop.training.stepping.offload import Offload
from localprop.training.stepping.steps import OptimizerSteps


class TrainingState:
    """Optimizers with their schedules, one per local module, around a network.

    Args:
        net: the network.
        config: how its modules are trained.
        steps_per_epoch: steps of an epoch.
        device: where the network is.
        modules: those that are trained by this process; all, if left out. The network gives up the others' weights.
        average: replaces a module's gradients, in place, by their mean over processes that train the same module.
        span: given "compute" and a module, a context in which that module takes its step.
        exchange: where a head reads ahead into another process, or from one: what is exchanged with it.
        delayed: whether the host learns of NaN and infinity later and does not wait for the device; default: on CUDA.
        first: the step of the run with which its schedules begin, from 0.
        ema: a moving average of the backbone that goes on; default: a new one, where the settings have one.

    There is no random state in it: random numbers are drawn from seeds made of the run's seed and the place.
    """

    def __init__(
        self,
        net: LocalNetwork,
        config: OptimConfig,
        steps_per_epoch: int,
        device: torch.device,
        modules: range | None = None,
        average: Callable[[list[Tensor]], None] | None = None,
        span: Callable[[str, int], AbstractContextManager[Any]] | None = None,
        exchange: Exchange | None = None,
        delayed: bool | None = None,
        first: int = 0,
        ema: ModelEmaV3 | None = None,
    ) -> None:
        self.net, self.config, self.step, self.first = net, config, first, first
        self.average, self.span, self.exchange = average, span, exchange
        self.modules = modules or range(len(net.local_modules))
        self.phases: Sequence[Phase] = turns(net.local_modules, self.modules)
        self.optimizers = create_optimizers(net, self.modules, config)
        self.schedulers = [create_scheduler(optimizer, config, steps_per_epoch) for optimizer in self.optimizers]
        # A planner builds a state on the CPU whatever the settings; there is nothing to offload there.
        offloads = config.offload_optimizer and device.type == "cuda"
        offload = Offload(self.optimizers, device, backwards=net.exact) if offloads else None
        self.away: Away | None = to_host(device) if config.offload_boundaries and net.exact else None
        scaled = config.amp and config.amp_dtype == "float16"
        # One for each module: its loss overflows when it does, whatever the others', on whichever device they are.
        self.scalers = [torch.amp.GradScaler(device.type) if scaled else None for _ in self.modules]
        self.ema = ema or (ModelEmaV3(net.backbone, decay=config.model_ema_decay) if config.model_ema else None)
        self.delayed = device.type == "cuda" if delayed is None else delayed
        trained = [optimizer for optimizer in self.optimizers if any(g["params"] for g in optimizer.param_groups)]
        masked = self.delayed and all(map(masks_its_step, trained))
        self.mask = Mask([list(net.local_modules[k].parameters()) for k in self.modules], device) if masked else None
        steps = (net, self.modules, self.optimizers, self.scalers)
        self.steps = OptimizerSteps(*steps, config.clip_grad, offload, self.mask)
        self._rates = RatesOnDevice(trained, device) if self.mask else None
        self._average = AverageOnDevice(self.ema, self.mask.failed) if self.ema and self.mask else None
        self.captured: CapturedSteps | None = None
        if len(self.modules) < len(net.local_modules):
            net.keep(self.modules, *([self.ema.module] if self.ema else []))

    @property
    def lr(self) -> float:
        """The learning rate of the last step."""
        with self._plain_rates():
            return max(group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups)

    def capture(self, pool: GraphPool, refuse: Callable[[str], None]) -> None:
        """Captures steps as CUDA graphs; arguments as of `CapturedSteps`."""
        self.captured = CapturedSteps(self, pool, refuse)

    def train_step(self, batch: list[Tensor] | Carry, seed: int, last: bool = True) -> Tensor:
        """A step, or one micro-batch of it: forward and backward, module by module, and after the last optimizer steps.

        Args:
            batch: [inputs, targets], (B, ...) each. Both are taken out of the list, so that the inputs are freed when
                no later module needs them. Or a batch as it comes from the module before this process's first.
            seed: of the dropout and stochastic depth on this batch.
            last: whether this is the last of the step's `OptimConfig.micro_batches`. Gradients of those before wait.

        Returns:
            The losses of the modules so far: (K,) where the last is among those trained here, in exact training (1,).

        Raises:
            NonFiniteLossError: a local loss is NaN or infinite.
            NonFiniteGradientError: a gradient is, under a finite loss. After either error the weights of that module
                and of later ones are as before the step; those of earlier modules have been stepped. With float16 such
                a step of a module is skipped and its loss scale halved, as `GradScaler` does; this is an error once the
                scale is below 1. With a `mask` nothing is raised: `problem` returns the error later.
        """
        if last:
            self._begin_step()
        carry = Carry.of(batch)
        carry.away = self.away
        try:
            if not (self.captured and self.captured.run(carry, seed, last)):
                self.run(carry, seed, last)
        except NonFiniteLossError:
            self.steps.clear()
            raise
        if last:
            self.step += 1
        return torch.stack([loss.float() for loss in carry.losses])

    def _begin_step(self) -> None:
        """Sets what a step depends on besides its batch: learning rates and the weight of the moving average."""
        for scheduler in self.schedulers:
            if scheduler:
                scheduler.step_update(self.step - self.first)
        if self._rates:
            self._rates.set()
        if self._average:
            self._average.prepare(self.step + 1)
        if self.steps.offload:
            self.steps.offload.fetch(self.steps.offload.first)

    def run(self, carry: Carry, seed: int, last: bool) -> None:
        """Trains every module on a batch, one after the other; arguments as of `train_step`."""
        for phase in self.phases:
            with self.span("compute", phase.module) if self.span else nullcontext():
                self.net.seed_phase(phase, seed)
                self.run_phase(phase, carry, last)
                self.finish_phase(phase, carry.losses, last)
            if phase.module < self.modules.start:
                self._others.give_back(carry)
            elif phase.kind == "forward" and phase.module + 1 == self.modules.stop:
                self._others.hand_on(carry)
        if self.exchange:
            self.exchange.settle()
        if last:
            self.update_average()

    @property
    def _others(self) -> Exchange:
        assert self.exchange is not None, "a head reads ahead into another process"
        return self.exchange

    def run_phase(self, phase: Phase, carry: Carry, last: bool) -> None:
        """What the device does in a phase of a module's turn; the module's step too, if that is masked."""
        i = phase.module - self.modules.start
        self.net.run_phase(phase, carry, self._scaler(phase), self.config.micro_batches)
        if self.mask and phase.done:
            self.steps.step_masked(i, carry.losses[-1], last, self.average)

    def _scaler(self, phase: Phase) -> torch.amp.GradScaler | None:
        """Of the module that the losses of a phase train; in exact training of the nearest one that is trained."""
        i = phase.module - self.modules.start + (phase.kind == "ahead")
        while self.net.exact and i and not self.net.local_modules[i].trains:
            i -= 1
        return self.scalers[i]

    def finish_phase(self, phase: Phase, losses: Sequence[Tensor], last: bool) -> None:
        """What the host does after that, without a mask: it checks the latest loss and the gradients, and steps."""
        if phase.module < self.modules.start:
            # Its own process checks this too, but later: this one must not go on.
            if not (self.mask or self.scalers[0] or losses[-1].isfinite()):
                raise self.steps.finite.loss_error(phase.module, losses[-1].item(), self.step + 1)
        elif phase.done and not self.mask:
            self.steps.step_checked(phase.module - self.modules.start, losses[-1], self.step + 1, last, self.average)

    def update_average(self) -> None:
        """Takes the weights of this step into the moving average, if there is one."""
        if self._average:
            self._average.update(self.net.backbone)
        elif self.ema:
            self.ema.update(self.net.backbone, step=self.step + 1)

    def problem(self, losses: Sequence[float], flags: Sequence[float], step: int) -> NonFiniteLossError | None:
        """The error of a step that was not finite, once its numbers are on the host; gradients are then cleared.

        Args:
            losses: what `train_step` gave.
            flags: what `mask.flags` was after it.
            step: the step, from 1.
        """
        problem = self.steps.problem(losses, flags, step)
        if problem:
            self.steps.clear()
        return problem

    @contextmanager
    def _plain_rates(self) -> Iterator[None]:
        """Inside, learning rates are numbers."""
        if self._rates:
            self._rates.unset()
        yield
        if self._rates:
            self._rates.set()

    def renew_gradients(self) -> list[Tensor]:
        """Puts copies in the place of gradients that earlier micro-batches have left; gives these."""
        earlier = []
        for k in self.modules:
            for parameter in self.net.local_modules[k].parameters():
                if parameter.grad is not None:
                    earlier.append(parameter.grad)
                    parameter.grad = parameter.grad.clone()
        return earlier

    @property
    def evaluated(self) -> nn.Module:
        """The backbone whose accuracy counts: the moving average where there is one."""
        return self.ema.module if self.ema else self.net.backbone

    def tensors(self) -> dict[str, list[Tensor]]:
        """Everything that lives from step to step: "parameters" (with buffers and moving average), "optimizer"."""
        models = [self.net, *([self.ema] if self.ema else [])]
        tensors = [own for model in models for own in (*model.parameters(), *model.buffers()) if not own.is_meta]
        return {
            "parameters": tensors,  # what is trained elsewhere has none
            "optimizer": [t for optimizer in self.optimizers for t in plain_tensors(list(optimizer.state.values()))],
        }

    def parts(self) -> dict[str, Any]:
        """Everything that has to be saved of the modules trained here, as the parts of a checkpoint, one each.

        Raises:
            NonFiniteWeightError: a weight or a buffer is NaN or infinite, but for buffers that were when the network
                was built. Optimizer states may be: where a gradient's square overflows, Adam's step is zero.
        """
        if self.steps.offload:
            self.steps.offload.synchronize()
        shares = self.net.shares()
        parts: dict[str, Any] = {}
        with self._plain_rates():
            optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        for k, optimizer, scaler in zip(self.modules, optimizers, self.scalers, strict=True):
            parts[part_name(k)] = part = part_of(self.net, k, shares[k], optimizer, scaler, self.ema)
            self.steps.finite.require_part(k, part, self.step)
        return parts

    def flaw(self, parts: dict[str, Any]) -> str | None:
        """What is wrong with parts of a checkpoint, of any modules; None if nothing is.

        They may have another form, or hold something that is not finite and was when the network was built.
        """
        for own, part in parts.items():
            try:
                check_part(part)
            except Malformed as error:
                return f"{own}: {error}"
        for k in range(len(self.net.local_modules)):
            if flaw := self.steps.finite.flaw(k, parts.get(part_name(k), {})):
                return flaw
        return None

    def load(self, parts: dict[str, Any], step: int) -> None:
        """Restores what `parts` gave.

        Raises:
            CheckpointError: the parts are those of another network.
        """
        shares = self.net.shares()
        if self._rates:
            self._rates.unset()  # which those of the checkpoint are compared with
        for i, k in enumerate(self.modules):
            load_part(self.net, k, shares[k], parts, self.optimizers[i], self.scalers[i], self.ema)
            if self.steps.offload:
                self.steps.offload.release(i)
        self.step = step


def autocast(config: OptimConfig, device: torch.device) -> AbstractContextManager[Any]:
    """The context of mixed precision, where the settings have it."""
    return torch.autocast(device.type, getattr(torch, config.amp_dtype)) if config.amp else nullcontext()
