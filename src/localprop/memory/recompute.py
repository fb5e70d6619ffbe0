"""Recomputes in backward what is cheap to compute and large to keep: activation functions and layer norms.

Of `y = gelu(x); z = y @ w` autograd keeps x for gelu and y for the product, though y follows from x at a hundredth of
the product's cost. Inside `recomputing`, y is not kept: backward computes it again from x, which is kept anyway. So
nothing is kept longer for it, and the result is the same bit for bit. In a transformer's block this is the widest
tensor of the MLP and the input of the MLP; activation checkpointing, which computes the matrix products again too,
saves more and costs a third of the time.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# Each keeps its own input for backward, and gives the same bits when it is called again.
_CHEAP = {
    function: name
    for name, function in vars(F).items()
    if name in ("gelu", "silu", "mish", "hardswish", "elu", "softplus", "leaky_relu", "layer_norm")
}


@dataclass(eq=False)
class _Computation:
    """How to compute a tensor again."""

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: list[int]
    autocast: tuple[bool, torch.dtype]
    storage: weakref.ref[torch.UntypedStorage]

    def compute(self) -> Tensor:
        source = self.args[0]
        if [t._version for t in _tensors(self.args, self.kwargs)] != self.versions:
            raise RuntimeError(
                f"an input of {_CHEAP[self.function]} was changed in place before backward; keep recompute off"
            )
        enabled, dtype = self.autocast
        with torch.no_grad(), torch.autocast(source.device.type, dtype, enabled=enabled, cache_enabled=False):
            return self.function(*self.args, **self.kwargs)


class _Remember(TorchFunctionMode):
    """Remembers how the results of cheap functions come about, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.computations: dict[int, _Computation] = {}  # by the address of the result's storage

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _CHEAP and args and result.requires_grad and result._version == 0:  # which it is not in place
            self._remember(func, args, kwargs, result)
        return result

    def _remember(self, func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
        device = args[0].device.type
        storage = result.untyped_storage()
        detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        named = {k: v.detach() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        key, computations = storage._cdata, self.computations

        def forget(_: object) -> None:
            # Else what it is computed from would live on, though nobody will ask for the result.
            computations.pop(key, None)

        computations[key] = _Computation(
            func,
            detached,
            named,
            [t._version for t in _tensors(detached, named)],
            (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
            weakref.ref(storage, forget),
        )

    def computation(self, tensor: Tensor) -> _Computation | None:
        """How the storage of a tensor was computed, if that is known."""
        storage = tensor.untyped_storage()
        computation = self.computations.get(storage._cdata)
        # The address may belong to another tensor by now; and one written to in place is no longer the result.
        return computation if computation and computation.storage() is storage and tensor._version == 0 else None


@contextmanager
def recomputing(enabled: bool = True) -> Iterator[None]:
    """Inside, autograd keeps no results of activation functions and layer norms, but computes them again in backward.

    For forwards only: backward may run outside.
    """
    if not enabled:
        yield
        return
    memory = _Remember()

    def pack(tensor: Tensor) -> Any:
        computation = memory.computation(tensor)
        if computation is None:
            return tensor, tensor._version
        return computation, tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed[0], _Computation):
            computation, *view = packed
            return computation.compute().as_strided(*view)
        return _unchanged(packed)

    try:
        with memory, torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        memory.computations.clear()


@contextmanager
def keeping() -> Iterator[None]:
    """Inside `recomputing`, autograd keeps everything again, as it does outside."""
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (tensor, tensor._version), _unchanged):
        yield


def _unchanged(packed: tuple[Tensor, int]) -> Tensor:
    tensor, version = packed
    if tensor._version != version:  # hooks on saved tensors switch autograd's own check off
        raise RuntimeError("a tensor needed for backward was changed in place; keep recompute off")
    return tensor


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [value for value in [*args, *kwargs.values()] if isinstance(value, Tensor)]
