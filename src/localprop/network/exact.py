"""Exact training: the gradients of end-to-end training, in little more memory than that of the largest module.

The modules run one after the other, and all that stays is what crosses the boundaries between them. Then, from the last
module up, each one runs again, with its graph and with the same random numbers, and goes backward from the gradient of
its output. Its optimizer steps, and its memory is free, before the next one begins.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from localprop.memory.recompute import recomputing
from localprop.network.carry import Carry
from localprop.network.loss import NoLoss
from localprop.network.module import LocalModule, Place
from localprop.network.phase import Handed, Phase, Scaling, at_own_scale, backward, counted, lower_scale


def is_exact(modules: Sequence[LocalModule]) -> bool:
    """Whether the modules of a network are trained exactly: by the loss of the last alone."""
    return isinstance(modules[0].local_loss, NoLoss)


def exact_turns(count: int) -> tuple[Phase, ...]:
    """The phases of a batch: modules are done from the last to the first."""
    before = range(count - 1)
    first = (Phase(k, "first") for k in before)
    return *first, Phase(count - 1, "last"), *(Phase(k, "again") for k in reversed(before))


def run_exact(module: LocalModule, phase: Phase, carry: Carry, scaling: Scaling) -> Tensor | None:
    """Runs a phase of exact training; see `localprop.network.turns.run_phase`."""
    if phase.kind == "last":
        return _run_last(module, carry, scaling)
    if phase.kind == "first":
        _run_first(module, carry)
    else:
        with _as_then(module):
            _run_again(module, carry, scaling, first=phase.module == 0)
    return None


def _run_first(module: LocalModule, carry: Carry) -> None:
    """Runs a module for its output alone."""
    source = carry.features
    if source.requires_grad or module.trains:
        kept = carry.away(source) if carry.away else source
        with _as_it_was(module):
            carry.features = module.boundary(source, carry.context)
        if not isinstance(kept, Tensor):
            kept.settle()
        carry.boundaries.append(kept)
    else:  # it only runs: no gradient comes as far
        energies: list[Tensor] = []
        with torch.no_grad():
            carry.features = module(source, carry.context, 0, None, energies)
        carry.energies += energies
        carry.boundaries.append(None)
    # Casts of weights would stay, and the weights may change before the module runs again.
    torch.clear_autocast_cache()


def _run_last(module: LocalModule, carry: Carry, scaling: Scaling) -> Tensor | None:
    energies, carry.energies = carry.energies, []
    gradient: list[Tensor] = []
    source = carry.features
    with recomputing(module.recompute):
        output = module(_Begun.of(source, gradient), carry.context, 0, None, energies)
        loss, prediction = module.local_loss(output, source, carry.inputs, carry.targets)
        loss = counted(sum(energies, loss), carry)
    carry.features = output.detach()
    del source, output
    if loss.requires_grad:
        backward([scaling(loss)])
    carry.losses.append(loss.detach().clone())  # to which modules add their energies
    _pass_on(gradient, module, carry, scaling)
    return None if prediction is None else prediction.detach()


def _run_again(module: LocalModule, carry: Carry, scaling: Scaling, first: bool) -> None:
    """Runs a module again, and backward from the gradient of its output; no module is before the first."""
    kept = carry.boundaries.pop()
    if kept is None:
        return
    source = kept if isinstance(kept, Tensor) else kept.take()
    energies: list[Tensor] = []
    gradient: list[Tensor] = []
    with recomputing(module.recompute):
        begun = source if first else _Begun.of(source, gradient)
        output = module(begun, dict(carry.context), 0, None, energies)  # what units hand along is there already
    del kept, source, begun
    roots = []
    given = at_own_scale(carry, scaling)
    if given is not None and output.requires_grad:
        roots.append(Handed.apply(output, [given]))
    if energies:
        energy = counted(sum(energies[1:], energies[0]), carry)
        carry.losses[-1] += energy.detach()
        roots += [scaling(energy)] if energy.requires_grad else []
        del energy
    del output, given
    energies.clear()
    if roots:
        backward(roots)
    _pass_on(gradient, module, carry, scaling)


def _pass_on(gradient: list[Tensor], module: LocalModule, carry: Carry, scaling: Scaling) -> None:
    """Leaves the gradient of a module's input to the module before, whose own input begins to come from the host."""
    carry.gradient = gradient.pop() if gradient else None
    if carry.gradient is not None:
        carry.scale = scaling.scale(carry.gradient)
        lower_scale(module.trained() if scaling.scaler else (), carry.gradient, scaling)
    if carry.away and carry.boundaries and not isinstance(before := carry.boundaries[-1], Tensor | None):
        before.fetch()


def knowing_common_buffers(modules: Sequence[LocalModule]) -> Sequence[LocalModule]:
    """The modules; in exact training each is told which of its buffers others use, too."""
    used = [module.buffers_used for module in modules] if is_exact(modules) else []
    counts = Counter(name for own in used for name in own)
    for module, own in zip(modules, used, strict=False):
        module.common = frozenset(name for name in own if counts[name] > 1)
    return modules


@contextmanager
def _as_it_was(module: LocalModule) -> Iterator[None]:
    """Restores the buffers that a forward changes, such as batch norm's statistics: the next forward changes them.

    Those that other modules use, too, stay as this forward leaves them, so that all change them in their order.
    """
    common, own = module.buffer_places()
    module.begun = [buffer.clone() for _, _, buffer in common]
    copies = [buffer.clone() for _, _, buffer in own]
    yield
    _restore(own, copies)


@contextmanager
def _as_then(module: LocalModule) -> Iterator[None]:
    """Lets a module begin with the buffers with which it began before, and leaves those of others as they are now.

    That is until its backward is over: autograd watches what batch norm has read.
    """
    common, _ = module.buffer_places() if module.begun else ([], [])
    now = [buffer.clone() for _, _, buffer in common]
    _restore(common, module.begun)
    module.begun = []
    yield
    _restore(common, now)


def _restore(places: list[Place], values: list[Tensor]) -> None:
    """Puts buffers back, with these values."""
    # All: a batch norm does not count as a change in place.
    if places:
        with torch.no_grad():
            torch._foreach_copy_([buffer for _, _, buffer in places], values)
    for owner, name, buffer in places:
        owner._buffers[name] = buffer


class _Begun(torch.autograd.Function):
    """Where the graph of a module begins: takes the gradient that comes there, as it comes.

    A leaf would live as long as the graph, and would take its gradient in strides of its own.
    """

    @classmethod
    def of(cls, source: Tensor, gradient: list[Tensor]) -> Tensor:
        """What a module takes, from a boundary: its gradient is put into the list."""
        if not source.requires_grad:
            return source
        anchor = source.new_zeros((), requires_grad=True)
        return cls.apply(anchor, source.detach(), gradient)

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, source: Tensor, gradient: list[Tensor]) -> Tensor:
        ctx.gradient = gradient
        return source.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.gradient.append(gradient)
        return None, None, None
