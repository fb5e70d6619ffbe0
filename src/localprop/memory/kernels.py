"""Makes operations on fake tensors of the CPU dispatch as on CUDA: autocast, attention, dropout."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.library import Library, fallthrough_kernel
from torch.nn import functional as F

from localprop.memory.autocast import CudaAutocast

_ALIGNMENT = 16
_MOST_CHANNELS = 256  # of a head, in flash attention
_autocast = CudaAutocast()


class _Keys(NamedTuple):
    """Keys of PyTorch's dispatch.

    Attributes:
        own: that of `_dispatch`. Nothing else uses it: it is autocast's on a device that PyTorch no longer supports.
            It comes before autograd, and is active only inside `kernels_of`.
        autocast: that key, and the key of autocast on the CPU.
        after: all that come after autocast's.
    """

    own: DispatchKey
    autocast: DispatchKeySet
    after: DispatchKeySet


@cache
def _keys() -> _Keys:
    own, cpu = DispatchKey.AutocastIPU, DispatchKey.AutocastCPU  # type: ignore[attr-defined]
    return _Keys(own, DispatchKeySet(own) | DispatchKeySet(cpu), torch._C._dispatch_keyset_full_after(cpu))


def _dropout(source: Tensor, p: float, train: bool) -> Tensor:
    """Dropout that keeps a mask of bytes (dropout in aten/src/ATen/native/Dropout.cpp)."""
    return torch.native_dropout(source, p, train)[0] if train and p > 0 else source


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Flash or memory-efficient attention, which both need four axes; with others, matrix products.

    The CPU's attention falls back to plain matrix products where a mask needs a gradient (Swin's position bias), and
    keeps the probabilities of every head; CUDA has kernels that keep none. Source: PyTorch's choice of kernels,
    aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, for one that has them all.
    """
    aten = torch.ops.aten
    if query.dim() != 4:
        math = aten._scaled_dot_product_attention_math
        return math(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is None and query.element_size() == 2 and query.shape[-1] <= _MOST_CHANNELS:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        last = attn_mask.shape[-1]
        if last % _ALIGNMENT:  # the kernel reads whole vectors: the mask is copied into a wider one
            attn_mask = F.pad(attn_mask, (0, -last % _ALIGNMENT))[..., :last]
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], last)
    gradients = any(t.requires_grad for t in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, gradients, dropout_p, is_causal, scale=scale
    )[0]


# What PyTorch computes in another way on CUDA, and what does so here.
_REPLACED: dict[str, Callable[..., Any]] = {"dropout": _dropout, "scaled_dot_product_attention": _attention}


@contextmanager
def kernels_of(device: str) -> Iterator[None]:
    """Inside, operations on the CPU need as much memory as on this type of device, "cpu" or "cuda".

    `torch.autocast("cpu", ...)` then casts as `torch.autocast("cuda", ...)` does.
    """
    if device != "cuda":
        yield
        return
    _register()
    clear = torch.clear_autocast_cache

    def clear_all() -> None:
        clear()
        _autocast.clear()

    with torch._C._IncludeDispatchKeyGuard(_keys().own), mock.patch.object(torch, "clear_autocast_cache", clear_all):
        torch.set_autocast_enabled("ipu", True)  # else the key is skipped
        try:
            yield
        finally:
            torch.set_autocast_enabled("ipu", False)
            _autocast.clear()


@cache
def _register() -> tuple[Library, Library]:
    """Registers what runs in place of every operation that an autocast knows, once for the process."""
    library = Library("aten", "IMPL", _keys().own.name)
    registered = torch._C._dispatch_get_registrations_for_dispatch_key
    cuda, cpu = set(registered("AutocastCUDA")), set(registered("AutocastCPU"))
    packets = {name.partition(".")[0] for name in cuda | cpu} | {f"aten::{name}" for name in _REPLACED}
    for namespace, _, packet in sorted(name.partition("::") for name in packets):
        if namespace != "aten":
            continue
        for form in getattr(torch.ops.aten, packet).overloads():
            op = getattr(getattr(torch.ops.aten, packet), form)
            run = partial(_dispatch, op, op.name() in cuda, _REPLACED.get(packet))
            library.impl(op, run, with_keyset=True)
    others = Library("_", "IMPL", _keys().own.name)
    others.fallback(fallthrough_kernel)
    return library, others


def _dispatch(
    op: Any, casts: bool, function: Callable[..., Any] | None, keys: DispatchKeySet, *args: Any, **kwargs: Any
) -> Any:
    """Runs an operation as CUDA does.

    Args:
        op: the operation.
        casts: whether CUDA's autocast knows it.
        function: what computes it on CUDA, if that is something else.
        keys: those under which the operation came here.
        *args: its arguments.
        **kwargs: likewise.
    """
    if _autocast.trying:
        _autocast.found(op, args, kwargs)
    if casts and torch.is_autocast_enabled("cpu"):
        form, args, kwargs = _autocast.cast(op, args, kwargs)
        # As autocast itself does: what it calls is not cast again.
        with torch._C._ExcludeDispatchKeyGuard(_keys().autocast):
            return (function or form)(*args, **kwargs)
    if function:
        return function(*args, **kwargs)
    return op.redispatch(keys & _keys().after, *args, **kwargs)
