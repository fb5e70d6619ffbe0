"""What one part of a module costs, a unit or a local loss: it runs forward and backward on fake tensors."""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from localprop.memory.kernels import kernels_of
from localprop.memory.recompute import recomputing
from localprop.memory.speed import MACHINES
from localprop.memory.tracker import Tracker
from localprop.settings.recipe import Recomputation
from localprop.tracing.constants import KeepConstants


@dataclass(frozen=True)
class Conditions:
    """What the cost of a unit or a local loss depends on, beside its own code.

    Attributes:
        batch_size: images per step, or per micro-batch.
        amp_dtype: type of automatic mixed precision; None without.
        recomputation: what of it runs again in backward: "none", "cheap", "whole" or in slices of the batch
            ("whole/4"); see `Recomputation`. A local loss never runs again as a whole.
        device: "cpu" or "cuda": whose kernels and speed to assume.
        input_gradient: whether its input needs a gradient; that of a module's first unit does not.
        gradients_wait: whether weights have gradients already, to which new ones are added, as in micro-batches. Then
            they need the same memory wherever a model is cut, and are left out.
        ahead: whether a head reads it ahead: its backward goes to its input alone, and what it keeps stays for another
            one. Only the time of that backward counts.
        frozen: numbers of the chain's units that are not trained.
    """

    batch_size: int = 32
    amp_dtype: torch.dtype | None = None
    recomputation: Recomputation = "none"
    device: str = "cpu"
    input_gradient: bool = True
    gradients_wait: bool = False
    ahead: bool = False
    frozen: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Cost:
    """The memory and time of one unit or local loss, in bytes, without weights and optimizer state.

    Attributes:
        kept: kept from forward to backward, beside input and output.
        forward: largest at any moment of forward, beside the input.
        backward: largest at any moment of backward, beside input and output: what is kept, and gradients.
        output: the output.
        keeps_input: whether the input is kept for backward.
        keeps_output: whether the output is kept for backward of what made it, as by a ReLU at the end.
        gradients: gradients of the parameters.
        seconds: expected time of forward and backward; of meaning only beside others.
    """

    kept: int
    forward: int
    backward: int
    output: int
    keeps_input: bool
    keeps_output: bool
    gradients: int
    seconds: float


def part_cost(
    mode: FakeTensorMode,
    run: Callable[[Tensor], Tensor],
    source: Tensor,
    parameters: Iterable[nn.Parameter],
    conditions: Conditions,
) -> tuple[Cost, Tensor]:
    """Runs a part forward and backward.

    Args:
        mode: the mode of the fake tensors.
        run: the part.
        source: a tensor like its input.
        parameters: those that it uses.
        conditions: under which it runs.

    Returns:
        The cost, and a tensor like the part's output.
    """
    trained = [p for p in parameters if p.requires_grad]
    tracker = Tracker(MACHINES[conditions.device])
    with mode, KeepConstants(), torch.enable_grad(), kernels_of(conditions.device):
        leaf = source.detach().requires_grad_(conditions.input_gradient)
        with tracker:
            gradients = _waiting_gradients(trained) if conditions.gradients_wait else []
            tracker.label([*trained, *gradients, leaf], "given")
            forward = _run_forward(tracker, run, leaf, conditions)
            start, begun = len(tracker.events), tracker.seconds if conditions.ahead else 0.0
            if forward.loss.requires_grad:
                inputs = [leaf] if conditions.ahead else None
                torch.autograd.backward(forward.loss, retain_graph=conditions.ahead, inputs=inputs)
            used = tracker.in_use()[start - 1 :]
        output = torch.empty(forward.shape, dtype=forward.dtype)
    cost = Cost(
        kept=forward.kept,
        forward=forward.peak,
        backward=max(used) - forward.outside,
        output=forward.size,
        keeps_input=forward.keeps_input,
        keeps_output=forward.keeps_output,
        gradients=0 if conditions.gradients_wait else sum(p.numel() * p.element_size() for p in trained),
        seconds=tracker.seconds - begun,
    )
    return cost, output


class _Forward(NamedTuple):
    """What a part's forward has left for its backward.

    Attributes:
        loss: where backward begins.
        shape: of the output.
        dtype: of the output.
        size: bytes of the output.
        storage: the output's memory, where something needs it still: it is kept until backward is over, as by
            `LocalNetwork.backward`.
        keeps_input: whether backward needs the input.
        keeps_output: whether backward needs the output, and that is no view of the input.
        peak: most bytes in use during forward, beside what was there before.
        kept: bytes kept for backward, beside input and output.
        outside: bytes in use that are not of this part: what was there before, input and output.
    """

    loss: Tensor
    shape: torch.Size
    dtype: torch.dtype
    size: int
    storage: torch.UntypedStorage | None
    keeps_input: bool
    keeps_output: bool
    peak: int
    kept: int
    outside: int


def _run_forward(tracker: Tracker, run: Callable[[Tensor], Tensor], leaf: Tensor, conditions: Conditions) -> _Forward:
    """Runs a part on a copy of `leaf`; when this returns, only what backward needs is alive."""
    half = conditions.amp_dtype
    # A copy, not a leaf: autograd itself keeps no reference to it, so it stays alive only if the part keeps it.
    entry = leaf.clone()
    input_memory = tracker.allocation(entry)
    before = tracker.used
    autocast = torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None)
    with autocast, recomputing(conditions.recomputation == "cheap"):
        output = run(entry)
    loss = _Gradient.apply(output)
    shape, dtype, size = output.shape, output.dtype, output.untyped_storage().nbytes()
    reference = weakref.ref(output.untyped_storage())
    shares_input = tracker.allocation(output) is input_memory
    peak = max(tracker.in_use()) - before
    del output, entry
    keeps_input = input_memory.stop is None
    storage = reference()
    keeps_output = storage is not None and not shares_input
    outside = before - (0 if keeps_input else input_memory.size) + (size if keeps_output else 0)
    kept = tracker.used - outside
    return _Forward(loss, shape, dtype, size, storage, keeps_input, keeps_output, peak, kept, outside)


def _waiting_gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Gives parameters gradients, as an earlier micro-batch does, and returns these."""
    gradients = [torch.empty_like(p) for p in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return gradients


class _Gradient(torch.autograd.Function):
    """Stands for what comes after: gives a gradient for `output` that is freed as soon as it is used."""

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        ctx.like = output.shape, output.dtype
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        shape, dtype = ctx.like
        return torch.empty(shape, dtype=dtype)
