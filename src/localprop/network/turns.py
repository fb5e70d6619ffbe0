"""A module's turn with a batch: forward, the head that may read ahead, and the one place where gradients are cut.

Exact training, in which none are cut, has turns of its own (`localprop.network.exact`).

A head that reads ahead (`Recipe.reach`) reads what the next module's first units make of the module's output. These
units run once: the next module goes on from their result. The gradient of the head's loss passes through them to the
module's output, and not into their weights, which the next module's own losses train.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from localprop.errors import batch_norm_told
from localprop.memory.recompute import recomputing
from localprop.network.carry import Carry, Pending
from localprop.network.exact import exact_turns, is_exact, run_exact
from localprop.network.loss import HeadLoss
from localprop.network.module import LocalModule
from localprop.network.phase import Handed, Phase, Scaling, at_own_scale, backward, counted, lower_scale


def turn(modules: Sequence[LocalModule], k: int) -> tuple[Phase, ...]:
    """The phases of module k's turn, in order."""
    if k + 1 < len(modules) and modules[k + 1].shared:
        return Phase(k, "forward"), Phase(k, "ahead"), Phase(k, "backward")
    return (Phase(k, "whole"),)


def turns(modules: Sequence[LocalModule], own: range) -> tuple[Phase, ...]:
    """The phases of a batch in a process that trains the modules `own`, in order.

    A head that reads ahead is trained where the module is whose units it reads. So the phase "ahead" of the module
    before these comes first, and that of the last of them is left to the next process. Exact training is in one
    process.
    """
    if is_exact(modules):
        return exact_turns(len(modules))
    before = [Phase(own.start - 1, "ahead")] if modules[own.start].shared else []
    phases = [*before, *(phase for k in own for phase in turn(modules, k))]
    return tuple(phase for phase in phases if phase != (own.stop - 1, "ahead"))


def run_phase(modules: Sequence[LocalModule], phase: Phase, carry: Carry, scaling: Scaling) -> Tensor | None:
    """Runs a phase of a turn on a batch.

    Args:
        modules: all local modules of the network.
        phase: the phase.
        carry: the batch, which the phase brings on.
        scaling: of the losses; in the phase "ahead" that of the next module, which trains the head.

    Returns:
        The prediction of the module's head, detached; None where it has none, or another phase gives it.

    Raises:
        ConfigError: batch norm is to train on a single value per channel.
    """
    k, kind = phase
    module, images = modules[k], len(carry.targets)
    with batch_norm_told(_place(modules, k), images):
        if kind == "ahead":
            told = batch_norm_told(_place(modules, k + 1), images)  # whose units run
            return _read_ahead(module, modules[k + 1], carry, scaling, told)
        if kind == "backward":
            _pass_back(module, carry, scaling)
            return None
        if not any(later.local_loss.uses_inputs for later in modules[k:]):
            carry.inputs = None
        if kind in ("first", "last", "again"):
            return run_exact(module, phase, carry, scaling)
        if kind == "forward":
            _run(module, carry, scaling)
            return None
        return _run_whole(module, carry, scaling)


def _place(modules: Sequence[LocalModule], k: int) -> str:
    units = modules[k].units
    return f"module {k + 1} of {len(modules)} ({units[0]} ... {units[-1]})"


def _run_whole(module: LocalModule, carry: Carry, scaling: Scaling) -> Tensor | None:
    energies, carry.energies = carry.energies, []
    with _remembering(module):
        output = module(carry.take(), carry.context, module.shared, None, energies)
        loss, prediction = module.local_loss(output, carry.features, carry.inputs, carry.targets)
        loss = counted(sum(energies, loss), carry)
    if loss.requires_grad:
        # Where it goes on from what the head before has read, its graph reaches into the output of the module before.
        backward([scaling(loss)], inputs=module.trained() if module.shared else None)
    carry.losses.append(loss.detach())
    _isolate(carry, output)
    return None if prediction is None else prediction.detach()


def _run(module: LocalModule, carry: Carry, scaling: Scaling) -> None:
    """Runs a module, and the part of its local loss that reads the output: back to the output, and no further yet."""
    energies, carry.energies = carry.energies, []
    loss = module.local_loss
    assert isinstance(loss, HeadLoss)  # or its head could not read ahead
    with _remembering(module):
        output = module(carry.take(), carry.context, module.shared, None, energies)
        leaf = output.detach().requires_grad_(output.requires_grad)
        rest = loss.rest(leaf, carry.features, carry.inputs, carry.targets)
    total = output.new_zeros((), dtype=torch.float32)
    if rest is not None:
        rest = counted(rest, carry)
        if rest.requires_grad:
            backward([scaling(rest)])
        total = rest.detach()
    energy = counted(sum(energies[1:], energies[0]), carry) if energies else None
    carry.losses.append(total if energy is None else total + energy.detach())
    carry.pending = Pending(output, leaf.grad, energy)
    _isolate(carry, output)


def _read_ahead(
    module: LocalModule, following: LocalModule, carry: Carry, scaling: Scaling, told: AbstractContextManager[None]
) -> Tensor | None:
    """Runs the units that a module's head reads ahead, and the head; backward to the module's output and to the head.

    If the module is frozen, its head only predicts. The units run where it is `told` whose batch norm cannot train.
    """
    loss, trains = module.local_loss, not module.frozen
    assert isinstance(loss, HeadLoss)
    leaf = carry.features.detach().requires_grad_(trains)
    with told, torch.set_grad_enabled(trains or not following.frozen), recomputing(following.recompute):
        seen = following(leaf, carry.context, 0, following.shared, carry.energies)
    # The head has a graph of its own, so that what it keeps is gone before the backward of the units.
    read = seen.detach().requires_grad_(trains)
    with torch.set_grad_enabled(trains), recomputing(following.recompute):
        judged, prediction = loss.judge(read, carry.targets)
    if judged is not None:
        judged = counted(judged, carry)
        if trains and judged.requires_grad:
            own = [p for p in loss.head_parameters() if p.requires_grad]
            backward([scaling(judged)], inputs=[read, *own])
            gradient, read.grad = read.grad, None
            if gradient is not None:
                handed = Handed.apply(seen, [gradient])
                del gradient
                backward([handed], inputs=[leaf], retain=not following.frozen)
            carry.gradient, leaf.grad = leaf.grad, None
            carry.scale = scaling.scale(leaf)
            lower_scale(own, carry.gradient, scaling)  # what overflows on its way through the shared units
        carry.losses[-1] = carry.losses[-1] + judged.detach()
    carry.ahead = seen
    return None if prediction is None else prediction.detach()


def _pass_back(module: LocalModule, carry: Carry, scaling: Scaling) -> None:
    """The backward of a module whose output's gradient has come from all that reads it."""
    pending, carry.pending = carry.pending, None
    assert pending is not None
    gradient = at_own_scale(carry, scaling)
    if pending.gradient is not None:
        gradient = pending.gradient if gradient is None else pending.gradient.add_(gradient)
        pending.gradient = None
    roots = []
    if gradient is not None and pending.output.requires_grad:
        roots.append(Handed.apply(pending.output, [gradient]))
    if pending.energy is not None and pending.energy.requires_grad:
        roots.append(scaling(pending.energy))
    del gradient, pending
    if roots:
        backward(roots, inputs=module.trained() if module.shared else None)


def _isolate(carry: Carry, output: Tensor) -> None:
    # Gradient isolation. Everywhere: no other line cuts the gradients of local losses. A head that reads ahead sends
    # one gradient back over it, to the module's output, which trains that module alone.
    carry.features = output.detach()


def _remembering(module: LocalModule) -> AbstractContextManager[None]:
    """What autograd keeps of a module: nothing if it is frozen."""
    return torch.no_grad() if module.frozen else recomputing(module.recompute)
