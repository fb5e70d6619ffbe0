"""Memory that a kernel allocates and frees before it returns, which fake tensors do not show."""

from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from localprop.memory.measure import allocated_changes

# Whose workspace is found by running them, and how many of their first arguments have a batch axis. Convolutions copy
# weights and maps into layouts of their own, as does bilinear upsampling; the rest is made of several operations.
_MEASURED = {
    torch.ops.aten.convolution.default: 1,
    torch.ops.aten.convolution_backward.default: 2,
    torch.ops.aten.native_batch_norm.default: 1,
    torch.ops.aten.native_batch_norm_backward.default: 2,
    torch.ops.aten.upsample_bilinear2d.default: 1,
    torch.ops.aten.binary_cross_entropy_with_logits.default: 2,
}
# These copy inputs that are not contiguous; and how many of the first arguments are such.
_COPYING = {torch.ops.aten.native_layer_norm.default: 1, torch.ops.aten.native_layer_norm_backward.default: 2}
_MOST = 16


def workspace(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes that an operation needs on this machine's CPU beside its results.

    Of a layer norm and of a roll it is known. Of a convolution and some others it is found by running them: on up to
    16 images as they are; of more, it is taken to go on growing as from 8 to 16. (It does not grow evenly from the
    first image on: kernels choose their algorithm by size.) Of anything else it is next to nothing.

    Args:
        func: an operation of `torch.ops.aten`.
        args: its arguments, with fake tensors.
    """
    if func in _COPYING:
        return sum(t.nbytes for t in args[: _COPYING[func]] if not t.is_contiguous())
    if func is torch.ops.aten.roll.default:
        return args[0].nbytes * (len(args[1]) > 1)  # one axis after the other
    batched = _MEASURED.get(func)
    if not batched:
        return 0
    batch = args[0].shape[0]
    key = [_describe(argument, i < batched) for i, argument in enumerate(args)]
    if func is torch.ops.aten.native_batch_norm_backward.default and key[2]:
        key[5:7] = key[2], key[2]  # mean and deviation have the weight's type, other than fake tensors tell
    with unset_fake_temporarily(), torch.autocast("cpu", enabled=False):
        if batch <= _MOST:
            return _measure(func, tuple(key), batch)
        half, whole = (_measure(func, tuple(key), size) for size in (_MOST // 2, _MOST))
    # From nothing to all of it is a change of algorithm: it grows in proportion at most.
    growth = min(max(whole - half, 0), whole // 2)
    return whole + growth * (batch - _MOST) // (_MOST // 2)


def _describe(argument: Any, batched: bool) -> Any:
    """What the workspace depends on; of a batch, all but its size."""
    if not isinstance(argument, Tensor):
        return tuple(argument) if isinstance(argument, list) else argument
    start = 1 if batched else 0
    return _Shape((batched, *argument.shape[start:]), argument.stride(), argument.dtype)


class _Shape(tuple):
    """Describes a tensor: (whether it has a batch axis, *other sizes), strides, type."""

    __slots__ = ()

    def __new__(cls, *parts: Any) -> "_Shape":
        return super().__new__(cls, parts)

    def build(self, batch: int) -> Tensor:
        (batched, *sizes), strides, dtype = self
        return torch.empty_strided([batch, *sizes] if batched else sizes, strides, dtype=dtype).zero_()


@cache
def _measure(func: Any, key: tuple[Any, ...], batch: int) -> int:
    args = [part.build(batch) if isinstance(part, _Shape) else part for part in key]
    args = [list(a) if isinstance(a, tuple) else a for a in args]
    changes, result = allocated_changes(lambda: func(*args))
    del result
    return max(accumulate(changes), default=0) - sum(changes)
