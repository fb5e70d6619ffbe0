"""Units that run by themselves: private copies with weights of their own, and what earlier units hand along to them.

Sizes of grids, rotary tables and masks that earlier units hand along depend on the size of the images, and mostly on
nothing else. They are found by running the model on random images, twice, with different images and numbers of them.
"""

import copy
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from localprop.errors import ChainError
from localprop.tracing.blocks import is_adapted, without_adapters
from localprop.tracing.copies import HOOKS
from localprop.tracing.units import Chain, Unit

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

Weights = Literal["none", "new", "copied"]
"""What values the weights of a copy have: none that mean anything, where only its cost is asked for; new ones; or the
model's."""

_SIZES = 2, 3


class BatchSize:
    """Stands for the number of examples in a batch."""


def private_units(model: nn.Module, units: Iterable[Unit], weights: Weights) -> tuple[nn.Module, tuple[Unit, ...]]:
    """A small model that has what these units use of `model`, under the same names, and the units that run on it.

    All of its parameters are to be trained, hooks and adapters are left out, and no unit runs again in backward. New
    weights are drawn from a normal distribution of the mean and the spread that the model's own have, tensor by tensor;
    what is constant, as biases and scales of a new model, stays so. So they have the scale that the model's author
    chose, with no knowledge of the class. Norms that training has moved begin anew.

    Args:
        model: the model; it is not changed.
        units: of its chain.
        weights: what values the copy's have.
    """
    root, memo = nn.Module(), _memo(model)
    for unit in units:
        for name in unit.modules:
            _place(root, name, without_adapters(copy.deepcopy(model.get_submodule(name), memo)))
        for name in unit.tensors:
            owner, _, leaf = name.rpartition(".")
            tensor = getattr(model.get_submodule(owner), leaf)
            own = memo.get(id(tensor))
            if own is None:  # computed by a parametrization, or a plain tensor
                own = nn.Parameter(torch.empty_like(tensor)) if tensor.requires_grad else tensor.detach().clone()
            _place(root, name, own)
    if weights != "none":
        for name, parameter in root.named_parameters():
            _fill(parameter, _original(model, name), weights)
        if weights == "new":
            _begin_norms_anew(root)
    return root.train(model.training), tuple(replace(unit, switches=()) for unit in units)


class PrivateChain(nn.Module):
    """Private copies of some units of a chain, which run one after the other, with what earlier units hand along.

    Args:
        model: the model; it is not changed.
        units: its chain.
        start: before it, values are constants; see `handed_along`.
        chosen: places of the units from `start` on that are copied, in order.
        weights: see `private_units`.

    Raises:
        ChainError: a value that a unit reads differs from batch to batch.
        AttributeError: a part of the model is not where the chain says.
    """

    def __init__(self, model: nn.Module, units: Chain, start: int, chosen: Sequence[int], weights: Weights) -> None:
        super().__init__()
        handed = handed_along(model, units, start, chosen, units.input_size)
        self.net, self._units = private_units(model, [units[i] for i in chosen], weights)
        self._handed: dict[bool, dict[str, Any]] = {mode: {} for mode in handed}
        for mode, values in handed.items():
            for name, value in values.items():
                self._keep(mode, name, value)

    def forward(self, features: Tensor) -> Tensor:
        """Runs the units on features as the first of them takes them."""
        values = {name: self._value(own, features) for name, own in self._handed[self.training].items()}
        for unit in self._units:
            features = unit(self.net, features, values)
        return features

    def extra_repr(self) -> str:
        """The units that it copies, on which its cost depends."""
        return ", ".join(unit.name for unit in self._units)

    def _keep(self, mode: bool, name: str, value: Any) -> None:
        """Keeps a value of earlier units; tensors as buffers, which move with the copies and are not saved."""
        if isinstance(value, Tensor):
            key = f"handed_{'train' if mode else 'eval'}_{name}"
            self.register_buffer(key, value, persistent=False)
            value = _Buffer(key)
        self._handed[mode][name] = value

    def _value(self, kept: Any, features: Tensor) -> Any:
        if isinstance(kept, _Buffer):
            return getattr(self, kept)
        return len(features) if isinstance(kept, BatchSize) else kept


class _Buffer(str):
    """The name of a buffer in which a value is kept."""


def is_trained(model: nn.Module) -> bool:
    """Whether a model has been trained before: the weights of a norm, which begin alike, have become different."""
    norms = (module.weight for module in model.modules() if isinstance(module, _NORMS))
    return any(isinstance(weight, Tensor) and not _is_constant(weight) for weight in norms)


def _memo(model: nn.Module) -> dict[int, Any]:
    """For `copy.deepcopy`: parameters without values, buffers with theirs, and no hooks."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        floating = parameter.is_floating_point() or parameter.is_complex()
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter), requires_grad=floating)
    for module in model.modules():
        memo.update({id(getattr(module, hooks)): OrderedDict() for hooks in HOOKS})
    return memo


def _place(root: nn.Module, name: str, value: nn.Module | Tensor) -> None:
    """Gives `root` a module or a tensor of a dotted name, with the modules on the way to it."""
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    if hasattr(root, leaf):
        return  # of a module that another unit, or this one, uses as a whole
    if isinstance(value, nn.Module):
        root.add_module(leaf, value)
    elif isinstance(value, nn.Parameter):
        root.register_parameter(leaf, value)
    else:
        root.register_buffer(leaf, value, persistent=False)


def _original(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    return getattr(module.base_layer if is_adapted(module) else module, leaf).detach()


@torch.no_grad()
def _fill(parameter: nn.Parameter, original: Tensor, weights: Weights) -> None:
    if weights == "copied" or not parameter.is_floating_point() or _is_constant(original):
        parameter.copy_(original)
    else:
        parameter.normal_(original.mean().item(), original.std().item())


def _begin_norms_anew(root: nn.Module) -> None:
    for module in root.modules():
        if isinstance(module, _NORMS):
            if isinstance(module.weight, Tensor) and not _is_constant(module.weight):
                module.reset_parameters()
            if isinstance(module, _NormBase):
                module.reset_running_stats()


def _is_constant(tensor: Tensor) -> bool:
    return tensor.numel() < 2 or bool((tensor == tensor.flatten()[0]).all())


def writers(units: Sequence[Unit], chosen: Collection[int], start: int) -> set[int]:
    """The units from `start` on that make what the `chosen` ones read, and what these read in turn.

    Args:
        units: a chain.
        chosen: places of units in it.
        start: before it, values are constants; see `handed_along`.

    Returns:
        Their places, with those of the chosen ones.
    """
    result, pending = set(chosen), list(chosen)
    while pending:
        place = pending.pop()
        reads = {name for code in units[place].code.values() for name in code.reads}
        for i in range(start, place):
            if i not in result and any(reads.intersection(code.writes) for code in units[i].code.values()):
                result.add(i)
                pending.append(i)
    return result


def handed_along(
    model: nn.Module, units: Sequence[Unit], start: int, chosen: Sequence[int], input_size: tuple[int, ...]
) -> dict[bool, dict[str, Any]]:
    """What units before `start` hand along to the `chosen` ones, by whether the model is in training mode.

    Args:
        model: the backbone; it is not changed.
        units: its chain.
        start: place in it.
        chosen: places of units from `start` on.
        input_size: (channels, height, width) of an image.

    Raises:
        ChainError: a value differs from batch to batch.
    """
    found: dict[bool, dict[str, Any]] = {}
    for training in (True, False):
        first = {name: units[place] for place in chosen for name in units[place].code[training].reads}
        written = {name for place in chosen for name in units[place].code[training].writes}
        needed = {name: unit for name, unit in first.items() if name not in written}
        found[training] = {}
        if not needed:
            continue
        one, other = (_context(model, units[:start], input_size, training, size) for size in _SIZES)
        for name, unit in needed.items():
            value = _constant(one[name], other[name])
            if value is None:
                raise ChainError(f"unit {unit.name} reads a value of earlier units that differs from batch to batch")
            found[training][name] = value
    return found


def _context(
    model: nn.Module, units: Sequence[Unit], input_size: tuple[int, ...], training: bool, size: int
) -> dict[str, Any]:
    """What the units hand along for a batch of random images; buffers such as batch norm's are a copy's."""
    duplicate = copy.deepcopy(model).train(training)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    context: dict[str, Any] = {}
    devices = [like.device] if like.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(size)
        features: Tensor = torch.randn(size, *input_size, dtype=like.dtype, device=like.device)
        for unit in units:
            features = unit(duplicate, features, context)
    return context


def _constant(one: Any, other: Any) -> Any:
    """The value, if it is the same for every batch, or a `BatchSize`; None where it depends on the batch's content."""
    if isinstance(one, Tensor):
        return one if isinstance(other, Tensor) and torch.equal(one, other) else None
    if one == other:
        return one
    return BatchSize() if (one, other) == _SIZES else None
