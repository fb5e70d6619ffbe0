"""What changes while a network is trained: weights, optimizers, learning rates, loss scale, moving average."""

from contextlib import nullcontext
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from localprop.config import OptimConfig
from localprop.errors import CheckpointError, NonFiniteLossError
from localprop.memory import plain_tensors
from localprop.network import LocalNetwork
from localprop.offload import Offload
from localprop.optimizers import create_optimizer, create_scheduler


class TrainingState:
    """K optimizers with their schedules, one per local module, around a network.

    There is no random state in it: every random number of a run is drawn from a seed made of the run's seed and the
    place where it is needed (epoch, batch, module).
    """

    def __init__(self, net: LocalNetwork, config: OptimConfig, steps_per_epoch: int, device: torch.device) -> None:
        self.net = net
        self.config = config
        self.step = 0
        self.optimizers = [create_optimizer(module, config) for module in net.local_modules]
        self.schedulers = [create_scheduler(optimizer, config, steps_per_epoch) for optimizer in self.optimizers]
        # A planner builds a state on the CPU whatever the settings; there is nothing to offload there.
        offloads = config.offload_optimizer and device.type == "cuda"
        self.offload = Offload(self.optimizers, device) if offloads else None
        scaled = config.amp and config.amp_dtype == "float16"
        self.scaler = torch.amp.GradScaler(device.type) if scaled else None
        self.ema = ModelEmaV3(net.backbone, decay=config.model_ema_decay) if config.model_ema else None

    @property
    def lr(self) -> float:
        """The learning rate of the last step."""
        return max(group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups)

    def train_step(self, batch: list[Tensor], seed: int) -> Tensor:
        """One step: forward, backward and optimizer step, module by module.

        Args:
            batch: images (B, channels, height, width), and labels: (B,) integers, or (B, C) probabilities. Both are
                taken out of the list, so that the images are freed when no later module needs them.
            seed: of the step's dropout and stochastic depth.

        Returns:
            (K,) local losses.

        Raises:
            NonFiniteLossError: a local loss is NaN or infinite; the weights of its module are as before the step.
        """
        for scheduler in self.schedulers:
            if scheduler:
                scheduler.step_update(self.step)
        if self.offload:
            self.offload.fetch(0)
        output = self.net.backward(
            batch.pop(0), batch.pop(), scaler=self.scaler, seed=seed, after_module=self._step_module
        )
        if self.scaler:
            self.scaler.update()
        self.step += 1
        if self.ema:
            self.ema.update(self.net.backbone, step=self.step)
        return output.losses

    def _step_module(self, k: int, loss: Tensor) -> None:
        if not loss.isfinite():
            module = self.net.local_modules[k]
            raise NonFiniteLossError(
                f"the loss of module {k + 1} of {len(self.optimizers)} ({module.units[0]} ... {module.units[-1]}) is "
                f"{loss.item()} at step {self.step + 1}; its weights were not touched: lower --lr or set --clip-grad"
            )
        optimizer = self.optimizers[k]
        if self.scaler:
            self.scaler.unscale_(optimizer)
        if self.config.clip_grad:
            nn.utils.clip_grad_norm_(self.net.local_modules[k].parameters(), self.config.clip_grad)
        with self.offload.present(k) if self.offload else nullcontext():
            if self.scaler:
                self.scaler.step(optimizer)
            else:
                optimizer.step()
            # Gone before the next module's gradients come.
            optimizer.zero_grad(set_to_none=True)

    @property
    def evaluated(self) -> nn.Module:
        """The backbone whose accuracy counts: the moving average where there is one."""
        return self.ema.module if self.ema else self.net.backbone

    def tensors(self) -> dict[str, list[Tensor]]:
        """Everything that lives from step to step: "parameters" (with buffers and moving average), "optimizer"."""
        models = [self.net, *([self.ema] if self.ema else [])]
        return {
            "parameters": [tensor for model in models for tensor in (*model.parameters(), *model.buffers())],
            "optimizer": [t for optimizer in self.optimizers for t in plain_tensors(list(optimizer.state.values()))],
        }

    def parts(self) -> dict[str, Any]:
        """Everything that has to be saved, as the parts of a checkpoint."""
        if self.offload:
            self.offload.synchronize()
        parts: dict[str, Any] = {"backbone": self.net.backbone.state_dict()}
        for k, (module, optimizer) in enumerate(zip(self.net.local_modules, self.optimizers, strict=True)):
            parts[f"module-{k}"] = {
                "auxiliary": module.auxiliary.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
        if self.ema:
            parts["ema"] = self.ema.module.state_dict()
        if self.scaler:
            parts["scaler"] = self.scaler.state_dict()
        return parts

    def load(self, parts: dict[str, Any], step: int) -> None:
        """Restores what `parts` gave.

        Raises:
            CheckpointError: the parts are those of another network.
        """
        try:
            self.net.backbone.load_state_dict(parts["backbone"])
            for k, (module, optimizer) in enumerate(zip(self.net.local_modules, self.optimizers, strict=True)):
                module.auxiliary.load_state_dict(parts[f"module-{k}"]["auxiliary"])
                optimizer.load_state_dict(parts[f"module-{k}"]["optimizer"])
                if self.offload:
                    self.offload.release(k)
            if self.ema:
                self.ema.module.load_state_dict(parts["ema"])
            if self.scaler:
                self.scaler.load_state_dict(parts["scaler"])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(
                f"the checkpoint does not fit the network ({reason}); resume with the versions of localprop and timm "
                "that the run was started with"
            ) from None
        self.step = step
