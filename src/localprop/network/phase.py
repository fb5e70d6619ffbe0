"""A part of a module's turn: its random numbers, the scale of its losses, and its backward."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from localprop.network.carry import Carry
from localprop.seeding import Purpose


class Phase(NamedTuple):
    """A part of a module's turn. It has a stream of random numbers, and is one CUDA graph.

    Attributes:
        module: whose turn it is.
        kind: "whole", of a module whose head reads its own output; else "forward" with all that reads the output,
            then "ahead", of the next module's first units and the head, and then "backward". In exact training "last"
            of the last module, and of the others "first" and "again"; see `localprop.network.exact`.
    """

    module: int
    kind: Literal["whole", "forward", "ahead", "backward", "first", "last", "again"]

    @property
    def purpose(self) -> Purpose:
        """For what its random numbers are drawn. A module that runs twice draws the same ones."""
        return self.kind if self.kind == "ahead" or self.kind == "backward" else "module"

    @property
    def done(self) -> bool:
        """Whether the module's gradients are there after it."""
        return self.kind in ("whole", "backward", "last", "again")


class Scaling(NamedTuple):
    """What a loss is multiplied by before its backward.

    Attributes:
        scaler: scales it (float16); that of the module whose optimizer steps what the loss trains.
        parts: how many batches make one step.
    """

    scaler: torch.amp.GradScaler | None = None
    parts: int = 1

    def __call__(self, loss: Tensor) -> Tensor:
        """The scaled loss."""
        share = loss / self.parts if self.parts > 1 else loss
        return self.scaler.scale(share) if self.scaler else share

    def scale(self, like: Tensor) -> Tensor | None:
        """The loss scale (a scalar on the device of `like`); None without."""
        return self.scaler.scale(torch.ones((), device=like.device)) if self.scaler else None


def at_own_scale(carry: Carry, scaling: Scaling) -> Tensor | None:
    """Takes the gradient of a module's output off a batch, at the loss scale of that module; None without one."""
    gradient, carry.gradient = carry.gradient, None
    if gradient is None or carry.scale is None:
        return gradient
    own = scaling.scale(gradient)
    if own is None:
        return gradient
    # In place, but where several of its elements may be one.
    return gradient.mul_(own / carry.scale) if gradient.is_contiguous() else gradient * (own / carry.scale)


def lower_scale(trained: Iterable[Tensor], gradient: Tensor | None, scaling: Scaling) -> None:
    """Lets a gradient that leaves a module lower the module's loss scale where it has overflowed.

    The scale falls where a gradient of what the module trains is not finite: the first becomes NaN then.
    """
    if scaling.scaler and gradient is not None:
        own = next((parameter.grad for parameter in trained if parameter.grad is not None), None)
        if own is not None:
            own += gradient.abs().amax() * 0


def counted(loss: Tensor, carry: Carry) -> Tensor:
    """The loss with the weight that this batch has in its step."""
    return loss if carry.share is None else loss * carry.share


class Handed(torch.autograd.Function):
    """Where the backward of a tensor begins whose gradient is known: that is freed as soon as it is used.

    A gradient that is an argument of a backward pass lives until that is over.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, gradient: list[Tensor]) -> Tensor:
        ctx.gradient = gradient
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient.pop(), None


def backward(roots: Sequence[Tensor], inputs: Iterable[Tensor] | None = None, retain: bool = False) -> None:
    """Backward outside of autocast; into `inputs` alone where they are given."""
    leaves = None if inputs is None else list(inputs)
    if leaves == []:
        return
    device = roots[0].device.type
    if not torch.is_autocast_enabled(device):
        torch.autograd.backward(roots, None, retain, inputs=leaves)
        return
    torch.clear_autocast_cache()
    with torch.autocast(device, enabled=False):
        torch.autograd.backward(roots, None, retain, inputs=leaves)
    # Weights change right after this backward: casts of them that autocast has kept would be stale. Of units that run
    # again in backward there are some.
    torch.clear_autocast_cache()
