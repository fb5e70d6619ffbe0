"""CUDA's autocast for simulations on fake tensors of the CPU.

Each device's autocast has its own lists: CUDA's computes layer norms and bilinear upsampling in float32, for example,
and the CPU's does not. No list is kept here, since they differ by version: an operation is tried on fake tensors of
type "cuda", which need no GPU, and PyTorch's own autocast shows how it casts the arguments.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


class Rule(NamedTuple):
    """How CUDA's autocast changes a call of an operation.

    Attributes:
        op: the operation that it calls: the same, or another form of it.
        casts: for each argument, lists flattened, the type that it is cast to; None if it is not cast.
        more: further arguments after these, with their defaults.
        dtype: the `dtype` that is passed to the operation; None if none is passed.
    """

    op: Any
    casts: tuple[torch.dtype | None, ...]
    more: tuple[Any, ...]
    dtype: torch.dtype | None


class CudaAutocast:
    """Casts arguments as CUDA's autocast does, while `torch.autocast("cpu", ...)` is enabled.

    Like PyTorch's autocast it keeps cast weights until `clear`.

    Attributes:
        trying: whether an operation is being tried. The function that replaces it then calls `found`.
    """

    def __init__(self) -> None:
        self.trying = False
        self._rules: dict[Any, Rule] = {}
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # by the weight's id; the weight, so that the id stays its

    def clear(self) -> None:
        """Forgets the casts of weights, as `torch.clear_autocast_cache` does."""
        self._kept.clear()

    def cast(
        self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """What is called in place of an operation of `torch.ops.aten`, and its arguments, cast."""
        leaves, structure = tree_flatten((args, kwargs))
        half = torch.get_autocast_dtype("cpu")
        key = op, half, tuple(map(_type, leaves))
        rule = self._rules.get(key)
        if rule is None:
            rule = self._rules[key] = self._try(op, leaves, structure, half)
        cast = [leaf if to is None else self._cast(leaf, to) for leaf, to in zip(leaves, rule.casts, strict=True)]
        args, kwargs = tree_unflatten(cast, structure)
        if rule.dtype:
            kwargs["dtype"] = rule.dtype
        return rule.op, (*args, *rule.more), kwargs

    def _cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        # As cached_cast in aten/src/ATen/autocast_mode.cpp.
        weight = tensor.requires_grad and tensor.is_leaf and not tensor._is_view() and tensor.dtype == torch.float32
        if not (weight and dtype == torch.get_autocast_dtype("cpu") and torch.is_autocast_cache_enabled()):
            return tensor.to(dtype)
        if id(tensor) not in self._kept:
            self._kept[id(tensor)] = tensor, tensor.to(dtype)
        return self._kept[id(tensor)][1]

    def _try(self, op: Any, leaves: list[Any], structure: TreeSpec, half: torch.dtype) -> Rule:
        """Finds a rule by a call on fake tensors of type "cuda", under autocast."""
        enabled, before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        # Without the modes of the simulation: this is PyTorch's own autocast.
        with _disable_current_modes(), FakeTensorMode(), torch.no_grad():
            doubles = [_double(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            args, kwargs = tree_unflatten(doubles, structure)
            # torch.autocast itself refuses without a GPU.
            torch.set_autocast_dtype("cuda", half)
            torch.set_autocast_enabled("cuda", True)
            self.trying = True
            try:
                op(*args, **kwargs)
            except _FoundError as found:
                form, given, named = found.args
            finally:
                self.trying = False
                torch.set_autocast_enabled("cuda", enabled)
                torch.set_autocast_dtype("cuda", before)
        # What has its default may have been left out, or filled in.
        same = (*given[: len(args)], *args[len(given) :]), {name: named.get(name, kwargs[name]) for name in kwargs}
        casts = (None if new is old else _type(new) for old, new in zip(doubles, tree_flatten(same)[0], strict=True))
        return Rule(form, tuple(casts), given[len(args) :], None if "dtype" in kwargs else named.get("dtype"))

    def found(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Ends a trial: this is what autocast calls."""
        raise _FoundError(op, args, kwargs)


class _FoundError(Exception):
    """Ends a trial with an operation and its arguments."""


def _type(leaf: Any) -> torch.dtype | None:
    """The part of an argument that a rule depends on."""
    if isinstance(leaf, Tensor):
        return leaf.dtype
    return leaf if isinstance(leaf, torch.dtype) else None


def _double(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
