"""Attention as CUDA computes it, for simulations on fake tensors of the CPU.

The CPU's attention falls back to plain matrix products where a mask needs a gradient (Swin's position bias), and keeps
the probabilities of every head; CUDA has kernels that keep none. Source: PyTorch's choice of kernels,
aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, for one that has them all.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

_ALIGNMENT = 16
_MOST_CHANNELS = 256  # of a head, in flash attention


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Flash or memory-efficient attention, which both need four axes; with others, matrix products."""
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
