"""Finds NaN and infinity in losses, gradients and weights."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from localprop.errors import NonFiniteGradientError, NonFiniteLossError, NonFiniteWeightError
from localprop.network.module import BEFORE
from localprop.network.network import LocalNetwork

_UNTOUCHED = "weights from this module on are as before this step, and nothing is saved"
_UNTOUCHED_EXACT = "weights up to this module are as before this step, and nothing is saved"


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""
    floats = {name: tensor.detach() for name, tensor in tensors.items() if _can_be(tensor)}
    # The norms of all are one operation and one look at a number. A norm may overflow where no element does.
    if not floats or nn.utils.get_total_norm(floats.values()).isfinite():
        return []
    return [name for name, tensor in floats.items() if not tensor.isfinite().all()]


def wide_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all tensors together, as float64: it does not overflow where the elements are finite float32."""
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms))


def _can_be(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.is_meta


class FiniteChecks:
    """Tells what is not finite in a network, and in which module.

    Buffers that were not when the network was built may stay so, such as the masks of an attention.

    Args:
        net: the network, as it is built.
    """

    def __init__(self, net: LocalNetwork) -> None:
        self._net = net
        # Where a module shares a buffer, under all of its names.
        self._infinite = set(non_finite(dict(net.named_buffers(remove_duplicate=False))))

    def error(self, k: int, loss: Tensor, step: int, scaled: bool) -> NonFiniteLossError | None:
        """What is not finite after the backward pass of a module; None where only the norm overflowed.

        Args:
            k: the module, whose gradients are there.
            loss: its local loss.
            step: the step, from 1.
            scaled: whether the loss was scaled.
        """
        named = self._net.local_modules[k].named_parameters()
        name = next(iter(non_finite({name: p.grad for name, p in named if p.grad is not None})), None)
        # A loss scale that is too large shows in the gradients alone; they decide whether its step is skipped.
        if not loss.isfinite() and not (name and scaled):
            return self.loss_error(k, loss.item(), step)
        return self.gradient_error(k, name, loss.item(), step, scaled) if name else None

    def gradient_error(self, k: int, name: str, loss: float, step: int, scaled: bool) -> NonFiniteGradientError:
        """The error of a gradient that is not finite, that of parameter `name`; other arguments as of `error`."""
        scale = " with a loss scale of 1" if scaled else ""
        return NonFiniteGradientError(
            f"the gradient of {name} in module {self._describe(k)} is not finite at step {step}{scale}, its loss is "
            f"{loss:.4g}; {self._untouched}: lower --lr, or look for a division by zero in the backward pass"
        )

    def loss_error(self, k: int, loss: float, step: int) -> NonFiniteLossError:
        """The error of a local loss that is not finite; arguments as of `error`."""
        of = "" if self._net.exact else f" of module {self._describe(k)}"
        untouched = "nothing is saved" if self._net.exact else _UNTOUCHED
        return NonFiniteLossError(f"the loss{of} is {loss} at step {step}; {untouched}: lower --lr or set --clip-grad")

    def require_part(self, k: int, part: Mapping[str, Any], step: int) -> None:
        """Checks the part of a checkpoint that has module k, after `step` steps.

        Raises:
            NonFiniteWeightError: a weight or a buffer is NaN or infinite.
        """
        if name := self._non_finite(k, part):
            raise NonFiniteWeightError(
                f"{name} in module {self._describe(k)} is not finite after step {step}, so no checkpoint is saved; "
                "those before stay: start a new run with a lower --lr or with --clip-grad"
            )

    def flaw(self, k: int, part: Mapping[str, Any]) -> str | None:
        """What is not finite in the part of a checkpoint that has module k, in words; None where nothing is."""
        name = self._non_finite(k, part)
        return name and f"{name} in module {self._describe(k)} is not finite"

    def require(self, weights: Mapping[str, Tensor]) -> None:
        """Checks a state dict of the backbone before it is published.

        Raises:
            NonFiniteWeightError: a weight or a buffer is NaN or infinite.
        """
        if names := [name for name in non_finite(weights) if f"backbone.{name}" not in self._infinite]:
            raise NonFiniteWeightError(
                f"{names[0]} of the trained model is not finite, so it is not saved; start a new run with a lower --lr "
                "or with --clip-grad"
            )

    def _non_finite(self, k: int, part: Mapping[str, Any]) -> str | None:
        """The first tensor of a checkpoint's part that is not finite though it has to be."""
        for kind, owner in (
            ("backbone", "backbone"),
            ("auxiliary", f"local_modules.{k}.auxiliary"),
            ("ema", "backbone"),
        ):
            for name in non_finite(part.get(kind, {})):
                if not self._infinite & {f"{owner}.{name}", f"local_modules.{k - 1}.auxiliary.{name[len(BEFORE) :]}"}:
                    return name if kind == "backbone" else f"{kind} {name}"
        return None

    @property
    def _untouched(self) -> str:
        return _UNTOUCHED_EXACT if self._net.exact else _UNTOUCHED

    def _describe(self, k: int) -> str:
        units = self._net.local_modules[k].units
        return f"{k + 1} of {len(self._net.local_modules)} ({units[0]} ... {units[-1]})"
