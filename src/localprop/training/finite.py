"""Finds NaN and infinity in gradients and weights."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""
    floats = {name: tensor.detach() for name, tensor in tensors.items() if _can_be(tensor)}
    # The norms of all are one operation and one look at a number. A norm may overflow where no element does.
    if not floats or nn.utils.get_total_norm(floats.values()).isfinite():
        return []
    return [name for name, tensor in floats.items() if not tensor.isfinite().all()]


def wide_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all tensors together, as float64: it does not overflow where the elements are finite float32."""
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms))


def _can_be(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.is_meta
