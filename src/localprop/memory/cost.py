"""What units and auxiliary nets take in a training step, found by running them on fake tensors: no data, no GPU."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from localprop.errors import batch_norm_told
from localprop.memory.attention import kernels_of
from localprop.memory.recompute import recomputing
from localprop.memory.tracker import MACHINES, Tracker
from localprop.tracing.chains import Chain
from localprop.tracing.constants import KeepConstants
from localprop.tracing.tracer import fake_copy


@dataclass(frozen=True)
class Circumstances:
    """What the costs of a training step depend on, beside the network.

    Attributes:
        batch_size: images per step.
        amp_dtype: type of automatic mixed precision; None without.
        recompute: whether cheap results are computed again in backward (see `localprop.memory.recompute`).
        grad_checkpointing: whether units are checkpointed.
        device: "cpu" or "cuda": whose kernels and speed to assume.
        input_gradient: whether a unit's input needs a gradient; that of a module's first unit does not.
        gradients_wait: whether weights have gradients already, to which new ones are added, as in micro-batches. Then
            they take the same wherever a model is cut, and are left out.
    """

    batch_size: int = 32
    amp_dtype: torch.dtype | None = None
    recompute: bool = False
    grad_checkpointing: bool = False
    device: str = "cpu"
    input_gradient: bool = True
    gradients_wait: bool = False


@dataclass(frozen=True)
class Cost:
    """What one unit, or one local loss, takes; in bytes, weights and optimizer state left out.

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


def module_peak(units: Sequence[Cost], auxiliary: Cost) -> int:
    """Largest number of bytes that a module takes at any moment of its step, beside its input.

    Args:
        units: costs of its units, in order.
        auxiliary: cost of its local loss.
    """
    # Of each output, whether it is kept: for the unit itself, or for what follows.
    kept = [unit.keeps_output or after is None or after.keeps_input for unit, after in pairwise([*units, None]) if unit]
    peak = alive = 0  # alive: kept by the units before
    before = []
    for i, unit in enumerate(units):
        before.append(alive)
        given = 0 if i == 0 or kept[i - 1] else units[i - 1].output
        peak = max(peak, alive + given + unit.forward)
        alive += unit.kept + (unit.output if kept[i] else 0)
    peak = max(peak, alive + auxiliary.forward, alive + auxiliary.backward)
    gradients, output = auxiliary.gradients, units[-1].output  # which is the next module's input
    for i in reversed(range(len(units))):
        own = units[i].output if units[i].keeps_output and i + 1 < len(units) else 0
        peak = max(peak, before[i] + units[i].backward + own + gradients + output)
        gradients += units[i].gradients
    return peak


def unit_costs(model: nn.Module, chain: Chain, circumstances: Circumstances) -> list[Cost]:
    """The cost of each unit of a chain, in train mode."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    duplicate = fake_copy(model, mode).train()
    dtype = next((p.dtype for p in duplicate.parameters() if p.is_floating_point()), torch.float32)
    with mode:
        features = torch.empty(circumstances.batch_size, *chain.input_size, dtype=dtype)
    context: dict[str, Any] = {}
    costs = []
    for unit in chain:
        parameters = [duplicate.get_parameter(name) for name in unit.parameters]

        def run(x: Tensor, unit: Any = unit) -> Tensor:
            return unit(duplicate, x, context, circumstances.grad_checkpointing)

        with batch_norm_told(f"unit {unit.name}", circumstances.batch_size):
            cost, features = _measure(mode, run, features, parameters, circumstances)
        costs.append(cost)
    return costs


def auxiliary_cost(
    auxiliary: nn.Module,
    output: tuple[int, ...],
    target: tuple[int, ...],
    image: tuple[int, ...],
    circumstances: Circumstances,
) -> Cost:
    """The cost of a local loss on a module's `output`, whose input has shape `target` (batch axes left out)."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    duplicate = fake_copy(auxiliary, mode).train()
    batch = circumstances.batch_size
    half = circumstances.amp_dtype
    with mode:
        features = torch.empty(batch, *output, dtype=half)
        inputs, images = torch.empty(batch, *target, dtype=half), torch.empty(batch, *image)
        labels = torch.zeros(batch, dtype=torch.long)

    def run(x: Tensor) -> Tensor:
        return duplicate(x, inputs, images, labels)[0]

    with batch_norm_told("an auxiliary net", batch):
        return _measure(mode, run, features, duplicate.parameters(), circumstances)[0]


class Costs:
    """The costs of a model's units, and of local losses on them, each found once.

    Args:
        model: the backbone.
        chain: its units.
    """

    def __init__(self, model: nn.Module, chain: Chain) -> None:
        self.model, self.chain = model, chain
        self._units: dict[Circumstances, list[Cost]] = {}
        self._auxiliaries: dict[Any, Cost] = {}

    def units(self, circumstances: Circumstances) -> list[Cost]:
        """See `unit_costs`."""
        if circumstances not in self._units:
            self._units[circumstances] = unit_costs(self.model, self.chain, circumstances)
        return self._units[circumstances]

    def auxiliary(
        self, loss: nn.Module, output: tuple[int, ...], target: tuple[int, ...], circumstances: Circumstances
    ) -> Cost:
        """See `auxiliary_cost`. Losses whose nets look the same cost the same."""
        key = (repr(loss), output, target, circumstances)
        if key not in self._auxiliaries:
            self._auxiliaries[key] = auxiliary_cost(loss, output, target, self.chain.input_size, circumstances)
        return self._auxiliaries[key]


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


def _measure(
    mode: FakeTensorMode,
    run: Callable[[Tensor], Tensor],
    source: Tensor,
    parameters: Iterable[nn.Parameter],
    circumstances: Circumstances,
) -> tuple[Cost, Tensor]:
    """Runs a part forward and backward; gives its cost, and a tensor like its output."""
    parameters = [p for p in parameters if p.requires_grad]
    tracker, dtype = Tracker(MACHINES[circumstances.device]), circumstances.amp_dtype
    with mode, KeepConstants(), torch.enable_grad():
        leaf = source.detach().requires_grad_(circumstances.input_gradient)
        with tracker:
            waiting = [torch.empty_like(p) for p in parameters] if circumstances.gradients_wait else []
            for parameter, gradient in zip(parameters, waiting, strict=False):
                parameter.grad = gradient
            tracker.label([*parameters, *waiting, leaf], "given")
            # A copy, not a leaf, of which autograd itself holds no reference: it lives on only if the part keeps it.
            entry = leaf.clone()
            input_kept = tracker.allocation(entry)
            before = tracker.used
            with (
                torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None),
                recomputing(circumstances.recompute),
                kernels_of(circumstances.device),
            ):
                output = run(entry)
            loss = _Gradient.apply(output)
            shape, given, size = output.shape, output.dtype, output.untyped_storage().nbytes()
            aside = weakref.ref(output.untyped_storage())
            shares_input = tracker.allocation(output) is input_kept
            turn = len(tracker.events)
            del output, entry
            keeps_input = input_kept.stop is None
            own_output = aside()  # if it is kept; held until the end, as `LocalNetwork.backward` does
            keeps_output = own_output is not None and not shares_input
            without = before - (0 if keeps_input else input_kept.size) + (size if keeps_output else 0)
            kept, start = tracker.used - without, len(tracker.events)
            if loss.requires_grad:
                loss.backward()
            del loss
        after = torch.empty(shape, dtype=given)
    in_use = tracker.in_use()
    cost = Cost(
        kept=kept,
        forward=max(in_use[:turn]) - before,
        backward=max(in_use[start - 1 :]) - without,
        output=size,
        keeps_input=keeps_input,
        keeps_output=keeps_output,
        gradients=0 if circumstances.gradients_wait else sum(p.numel() * p.element_size() for p in parameters),
        seconds=tracker.seconds,
    )
    return cost, after
