"""What changes while a network is trained: weights, optimizers, learning rates, loss scale, moving average."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from localprop.errors import CheckpointError, NonFiniteGradientError, NonFiniteLossError, first_line
from localprop.memory.measure import plain_tensors
from localprop.network.carry import Carry
from localprop.network.network import LocalNetwork
from localprop.settings.config import OptimConfig
from localprop.system.reading import Malformed
from localprop.training.checkpoints.restoring import check_part, load_optimizer
from localprop.training.finite import FiniteChecks, wide_norm
from localprop.training.offload import Offload
from localprop.training.optimizers import create_optimizer, create_scheduler


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

    There is no random state in it: every random number of a run is drawn from a seed made of the run's seed and the
    place where it is needed (epoch, batch, module).
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
    ) -> None:
        self.net = net
        self.config = config
        self.step = 0
        self.average, self.span = average, span
        self.modules = range(len(net.local_modules)) if modules is None else modules
        # In the module's order, which averages and norms are rounded by; looking names up at every step takes time.
        self._parameters = [list(net.local_modules[k].parameters()) for k in self.modules]
        self._finite = FiniteChecks(net)
        self.optimizers = [create_optimizer(net.local_modules[k], config) for k in self.modules]
        self.schedulers = [create_scheduler(optimizer, config, steps_per_epoch) for optimizer in self.optimizers]
        # A planner builds a state on the CPU whatever the settings; there is nothing to offload there.
        offloads = config.offload_optimizer and device.type == "cuda"
        self.offload = Offload(self.optimizers, device) if offloads else None
        scaled = config.amp and config.amp_dtype == "float16"
        # One for each module: its loss overflows when it does, whatever the others', on whichever device they are.
        self.scalers = [torch.amp.GradScaler(device.type) if scaled else None for _ in self.modules]
        self.ema = ModelEmaV3(net.backbone, decay=config.model_ema_decay) if config.model_ema else None
        if len(self.modules) < len(net.local_modules):
            net.keep(self.modules, *([self.ema.module] if self.ema else []))

    @property
    def lr(self) -> float:
        """The learning rate of the last step."""
        return max(group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups)

    def train_step(self, batch: list[Tensor] | Carry, seed: int, last: bool = True) -> Tensor:
        """A step, or one micro-batch of it: forward and backward, module by module, and after the last optimizer steps.

        Args:
            batch: [inputs, targets], (B, ...) each. Both are taken out of the list, so that the inputs are freed when
                no later module needs them. Or a batch as it comes from the module before this process's first.
            seed: of the dropout and stochastic depth on this batch.
            last: whether this is the last of the step's `OptimConfig.micro_batches`. Gradients of those before wait.

        Returns:
            The local losses of the modules so far: (K,) where the last module is among those trained here.

        Raises:
            NonFiniteLossError: a local loss is NaN or infinite.
            NonFiniteGradientError: a gradient is, under a finite loss. After either error the weights of that module
                and of later ones are as before the step; those of earlier modules have been stepped. With float16 such
                a step of a module is skipped and its loss scale halved, as `GradScaler` does; this is an error once the
                scale is below 1.
        """
        if last:
            for scheduler in self.schedulers:
                if scheduler:
                    scheduler.step_update(self.step)
            if self.offload:
                self.offload.fetch(0)
        carry = Carry.of(batch)
        for i, k in enumerate(self.modules):
            with self.span("compute", k) if self.span else nullcontext(), self._clearing():
                self.net.train_module(k, carry, self.scalers[i], seed, self.config.micro_batches)
                if last:
                    self._step_module(i, carry.losses[-1])
                elif not self.scalers[i] and not carry.losses[-1].isfinite():
                    raise self._finite.loss_error(k, carry.losses[-1], self.step + 1)
        if last:
            self.step += 1
            if self.ema:
                self.ema.update(self.net.backbone, step=self.step)
        return torch.stack([loss.float() for loss in carry.losses])

    @contextmanager
    def _clearing(self) -> Iterator[None]:
        """Removes all gradients when a step fails: a later step must not add to them."""
        try:
            yield
        except NonFiniteLossError:
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
            raise

    def _step_module(self, i: int, loss: Tensor) -> None:
        """Steps the i-th of the modules that are trained here, whose gradients are there; `loss` is its local loss."""
        parameters = self._parameters[i]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not gradients:
            if not loss.isfinite():
                raise self._finite.loss_error(self.modules[i], loss, self.step + 1)
            return
        # First, so that all replicas judge the same gradients.
        if self.average:
            self.average(gradients)
        optimizer, scaler = self.optimizers[i], self.scalers[i]
        if scaler:
            scaler.unscale_(optimizer)
        norm, problem = nn.utils.get_total_norm(gradients), None
        # Both at once: on a GPU each look at a number waits for all that comes before it.
        if not (loss + norm).isfinite():
            problem = self._finite.error(self.modules[i], loss, self.step + 1, scaled=scaler is not None)
            norm = wide_norm(gradients)
        skipped = isinstance(problem, NonFiniteGradientError) and scaler
        if problem and not skipped:
            raise problem
        if self.config.clip_grad:
            nn.utils.clip_grads_with_norm_(parameters, self.config.clip_grad, norm)
        with self.offload.present(i) if self.offload else nullcontext():
            if scaler:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
            # Gone before the next module's gradients come.
            optimizer.zero_grad(set_to_none=True)
        if problem and scaler and scaler.get_scale() < 1:
            raise problem

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
        tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
        return {
            "parameters": [tensor for tensor in tensors if not tensor.is_meta],  # else trained elsewhere
            "optimizer": [t for optimizer in self.optimizers for t in plain_tensors(list(optimizer.state.values()))],
        }

    def parts(self) -> dict[str, Any]:
        """Everything that has to be saved of the modules trained here, as the parts of a checkpoint, one each.

        Raises:
            NonFiniteWeightError: a weight or a buffer is NaN or infinite, but for buffers that were when the network
                was built. Optimizer states may be: where a gradient's square overflows, Adam's step is zero.
        """
        if self.offload:
            self.offload.synchronize()
        shares = self.net.shares()
        weights = self.net.backbone.state_dict()
        averages = self.ema.module.state_dict() if self.ema else {}
        parts: dict[str, Any] = {}
        for k, optimizer, scaler in zip(self.modules, self.optimizers, self.scalers, strict=True):
            part = {
                "backbone": {name: weights[name] for name in shares[k]},
                "auxiliary": self.net.local_modules[k].local_loss.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            if self.ema:
                part["ema"] = {name: averages[name] for name in shares[k]}
            if scaler:
                part["scaler"] = scaler.state_dict()
            self._finite.require_part(k, part, self.step)
            parts[part_name(k)] = part
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
            if flaw := self._finite.flaw(k, parts.get(part_name(k), {})):
                return flaw
        return None

    def require_finite(self, weights: dict[str, Tensor]) -> None:
        """Checks a state dict of the backbone before it is published; see `FiniteChecks.require`."""
        self._finite.require(weights)

    def load(self, parts: dict[str, Any], step: int) -> None:
        """Restores what `parts` gave.

        Raises:
            CheckpointError: the parts are those of another network.
        """
        shares = self.net.shares()
        try:
            for i, k in enumerate(self.modules):
                part = parts[part_name(k)]
                _load_share(self.net.backbone, part["backbone"], shares[k])
                self.net.local_modules[k].local_loss.load_state_dict(part["auxiliary"])
                load_optimizer(self.optimizers[i], part["optimizer"])
                if self.offload:
                    self.offload.release(i)
                if self.ema:
                    _load_share(self.ema.module, part["ema"], shares[k])
                if scaler := self.scalers[i]:
                    scaler.load_state_dict(part["scaler"])
        except (LookupError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            reason = first_line(error)
            raise CheckpointError(
                f"the checkpoint does not fit the network ({reason}); resume with the versions of localprop and timm "
                "that the run was started with"
            ) from None
        self.step = step


def autocast(config: OptimConfig, device: torch.device) -> AbstractContextManager[Any]:
    """The context of mixed precision, where the settings have it."""
    return torch.autocast(device.type, getattr(torch, config.amp_dtype)) if config.amp else nullcontext()


def part_name(k: int) -> str:
    """What the part of a checkpoint is called that holds module k."""
    return f"module-{k}"


def whole_weights(parts: dict[str, Any]) -> dict[str, Tensor]:
    """The backbone's state dict from the parts of all modules: the moving average where there is one."""
    return {name: tensor for part in parts.values() for name, tensor in part.get("ema", part["backbone"]).items()}


def _load_share(model: nn.Module, values: dict[str, Tensor], names: list[str]) -> None:
    """Loads a module's share of a backbone's state dict; raises ValueError if it is another one's."""
    if other := values.keys() ^ names:
        raise ValueError(f"its modules hold other weights, such as {min(other)}")
    model.load_state_dict(values, strict=False)
