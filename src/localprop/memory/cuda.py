"""Memory on CUDA in addition to the results of operations: what kernels and libraries allocate for themselves.

Sources are files of PyTorch, as of 2.8 to 2.14.
"""

import os
import re
from typing import Any

import torch

_aten = torch.ops.aten
# Operations that copy inputs if these are not contiguous, with the number of arguments that they copy
# (aten/src/ATen/native/cuda: layer_norm_kernel.cu, SoftMax.cu, TensorTransformations.cu).
_COPYING = {
    _aten.native_layer_norm.default: 1,
    _aten.native_layer_norm_backward.default: 2,
    _aten._softmax.default: 1,
    _aten._softmax_backward_data.default: 2,
    _aten._log_softmax.default: 1,
    _aten._log_softmax_backward_data.default: 2,
    _aten.roll.default: 1,
}
_BLOCK = 512
_MIB = 2**20
_LARGE_BUFFER_FROM = (9, 0)  # Hopper


def cuda_workspace(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes that a kernel allocates in addition to its results, as PyTorch's code says.

    For cuDNN's convolutions they are not known, and left out.

    Args:
        func: an operation of `torch.ops.aten`.
        args: its arguments, with fake tensors.
    """
    count = _COPYING.get(func, 0)
    size = sum(t.nbytes for t in args[:count] if not t.is_contiguous())
    if func is _aten.roll.default and len(args[1]) > 1:
        size += args[0].nbytes  # one axis after the other
    if func is _aten.native_layer_norm_backward.default:
        size += _partial_sums(args[1].numel() // args[0].shape[-1], args[0].shape[-1])
    if func is _aten._softmax_backward_data.default:
        size += args[0].nbytes  # gradient times result, before the kernel (softmax_backward_cuda_out in SoftMax.cu)
    return size


def _partial_sums(rows: int, channels: int) -> int:
    """Bytes of the partial sums for weight and bias in the backward of a layer norm with many rows.

    Source: LaunchGammaBetaBackwardCUDAKernel in layer_norm_kernel.cu.
    """
    blocks = -(-channels // 32)
    return 2 * 4 * channels * min(-(-rows // 32), 32 * 1024 // blocks) if rows > 64 * 1024 else 0


def rounded(size: int) -> int:
    """Bytes that the allocator gives out for a request of `size` (round_size in c10/cuda/CUDACachingAllocator.cpp)."""
    return -(-size // _BLOCK) * _BLOCK


def matrix_product_buffers() -> list[int]:
    """Bytes of the buffers that matrix products need, and that are never freed.

    There are two: the thread that runs forward and autograd's thread have a handle each
    (aten/src/ATen/cuda/CublasHandlePool.cpp). Without a GPU, Hopper or later is assumed.
    """
    config = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    if config is not None:
        size = sum(int(kib) * int(count) * 1024 for kib, count in re.findall(r":(\d+):(\d+)", config))
    elif torch.cuda.is_available() and torch.cuda.get_device_capability() < _LARGE_BUFFER_FROM:
        size = 8 * _MIB + 128 * 1024
    else:
        size = 32 * _MIB
    return [size, size]
