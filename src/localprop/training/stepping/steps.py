"""The optimizer's step of a module, after its backward: checked by the host first, or masked on the device."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from localprop.errors import NonFiniteGradientError, NonFiniteLossError
from localprop.network.network import LocalNetwork
from localprop.training.finite import FiniteChecks, wide_norm
from localprop.training.stepping.mask import Mask
from localprop.training.stepping.offload import Offload

Average = Callable[[list[Tensor]], None]


class OptimizerSteps:
    """Steps the optimizers of the modules that a process trains.

    Args:
        net: the network.
        modules: those that are trained.
        optimizers: theirs.
        scalers: their loss scales; None without.
        clip: largest norm of a module's gradients; None for any.
        offload: where optimizer states rest, if not on the device.
        mask: holds steps back on the device; None where the host checks before each step.

    Attributes:
        offload: see above.
        parameters: those of each module.
        trained: the parameters of each module that had a gradient in its last step.
        buffers: the memory in which each module's gradients stay from step to step; None where they are freed.
    """

    def __init__(
        self,
        net: LocalNetwork,
        modules: range,
        optimizers: Sequence[torch.optim.Optimizer],
        scalers: Sequence[torch.amp.GradScaler | None],
        clip: float | None,
        offload: Offload | None,
        mask: Mask | None,
    ) -> None:
        self._net, self._modules, self._optimizers, self._scalers = net, modules, optimizers, scalers
        self._clip, self.offload, self.mask = clip, offload, mask
        # In the module's order, by which averages and norms are rounded; looking names up at every step takes time.
        self.parameters = [list(net.local_modules[k].parameters()) for k in modules]
        self.trained: list[list[nn.Parameter]] = [[] for _ in modules]
        self.buffers: list[list[Tensor]] | None = None
        self.finite = FiniteChecks(net)
        for optimizer, scaler in zip(optimizers, scalers, strict=True):
            if mask and not scaler:
                # Where a fused optimizer reads what a loss scaler writes.
                optimizer.grad_scale, optimizer.found_inf = None, mask.failed  # type: ignore[attr-defined]

    def clear(self) -> None:
        """Removes all gradients, and forgets a failure: a later step must not add to them."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        for gradients in self.buffers or []:
            forget(gradients)
        if self.mask:
            self.mask.reset()

    def reset_scalers(self) -> None:
        """Makes loss scalers forget a step that was begun and not taken."""
        for scaler in self._scalers:
            if scaler:
                scaler._per_optimizer_states.clear()

    def step_checked(self, i: int, loss: Tensor, step: int, last: bool, average: Average | None) -> None:
        """Steps the i-th module if everything is finite.

        Args:
            i: the module.
            loss: its local loss.
            step: the step, from 1.
            last: whether this is the step's last micro-batch; of others only the loss is checked.
            average: replaces gradients by their mean over processes.

        Raises:
            NonFiniteLossError, NonFiniteGradientError: see `TrainingState.train_step`.
        """
        k, scaler = self._modules[i], self._scalers[i]
        gradients = self._gradients(i) if last else []
        if not gradients:
            if (last or not scaler) and not loss.isfinite():
                raise self.finite.loss_error(k, loss.item(), step)
            return
        # First, so that all replicas check the same gradients.
        if average:
            average(gradients)
        if scaler:
            scaler.unscale_(self._optimizers[i])
        norm, problem = nn.utils.get_total_norm(gradients), None
        # Both at once: each number that is read from a GPU waits for all work before it.
        if not (loss + norm).isfinite():
            problem = self.finite.error(k, loss, step, scaled=scaler is not None)
            norm = wide_norm(gradients)
        if problem and not (isinstance(problem, NonFiniteGradientError) and scaler):
            raise problem
        self._step(i, norm)
        if problem and scaler and scaler.get_scale() < 1:
            raise problem

    def step_masked(self, i: int, loss: Tensor, last: bool, average: Average | None) -> None:
        """Steps the i-th module without a check by the host; arguments as of `step_checked`."""
        mask, scaler = self.mask, self._scalers[i]
        assert mask is not None
        gradients = self._gradients(i) if last else []
        if not gradients:
            if last or not scaler:
                mask.note_loss(i, loss)
            return
        if average:
            average(gradients)
        if scaler:
            scaler.unscale_(self._optimizers[i])
        norm = mask.gradient_norm(i, [parameter.grad for parameter in self.parameters[i]])
        if not scaler:
            mask.note(i, ~(loss + norm).isfinite())
            self._step(i, _narrow(norm))
            return
        # Gradients that overflow because the loss scale is too large are no failure: the step is skipped.
        (found,) = scaler._found_inf_per_device(self._optimizers[i]).values()
        skipped = found > 0
        mask.note(i, ~loss.isfinite() & ~skipped)
        found.copy_(torch.maximum(found, mask.failed))
        self._step(i, _narrow(norm))
        scale = scaler._get_scale_async()
        assert scale is not None  # it has been used
        mask.note(i, skipped & (scale < 1))

    def problem(self, losses: Sequence[float], flags: Sequence[float], step: int) -> NonFiniteLossError | None:
        """The first failure that the mask has found, once its flags are on the host.

        Args:
            losses: those of all modules up to this process's last.
            flags: see `Mask`.
            step: the step of these losses and flags, from 1.
        """
        i = next((i for i, flag in enumerate(flags) if flag), None)
        if i is None or self.mask is None:
            return None
        k, scaled = self._modules[i], self._scalers[i] is not None
        # The loss of an earlier process's module comes first: its output is not finite either. Exact training has one.
        own = range(k, k + 1) if self._net.exact else range(k + 1)
        first = next((j for j, loss in zip(own, losses, strict=False) if not abs(loss) < float("inf")), None)
        bad = self.mask.not_finite(i)
        if first is not None and (first < k or not (scaled and bad is not None)):
            return self.finite.loss_error(first, losses[first - own.start], step)
        parameter = None if bad is None else self.parameters[i][bad]
        names = (name for name, own in self._net.local_modules[k].named_parameters() if own is parameter)
        return self.finite.gradient_error(k, next(names, "a parameter"), losses[k - own.start], step, scaled)

    def _gradients(self, i: int) -> list[Tensor]:
        self.trained[i] = [parameter for parameter in self.parameters[i] if parameter.grad is not None]
        return [parameter.grad for parameter in self.trained[i] if parameter.grad is not None]

    def _step(self, i: int, norm: Tensor) -> None:
        """Clips gradients of a known norm, steps the optimizer, and frees the gradients."""
        optimizer, scaler = self._optimizers[i], self._scalers[i]
        if self._clip:
            nn.utils.clip_grads_with_norm_(self.parameters[i], self._clip, norm)
        with self.offload.present(i) if self.offload else nullcontext():
            if scaler:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
            if self.buffers is None:
                # Gone before the next module's gradients come.
                optimizer.zero_grad(set_to_none=True)
            else:
                forget(self.buffers[i])


def _narrow(norm: Tensor) -> Tensor:
    """A norm as float32, by which torch scales all gradients at once; at most float32's largest number."""
    return norm.clamp(max=torch.finfo(torch.float32).max).float()


def forget(gradients: list[Tensor]) -> None:
    """Sets gradients to -0: adding the first of several to it changes no bit."""
    if gradients:
        torch._foreach_zero_(gradients)
        torch._foreach_neg_(gradients)
