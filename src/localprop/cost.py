"""What units and auxiliary nets take in a training step, found by running them on fake tensors: no data, no GPU."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from localprop.chain import Chain
from localprop.tracing import fake_copy

_BATCH = 2  # large enough for batch norm; costs are per image


@dataclass(frozen=True)
class Cost:
    """The cost of a part of a network.

    Attributes:
        saved: bytes kept from forward for backward, per image.
        parameters: bytes of trainable parameters, and so of their gradients.
    """

    saved: float
    parameters: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.saved + other.saved, self.parameters + other.parameters)

    def bytes(self, batch_size: int) -> float:
        """Bytes that exist only while this part is trained: what it saves for backward, and its gradients."""
        return self.saved * batch_size + self.parameters


def unit_costs(model: nn.Module, chain: Chain) -> list[Cost]:
    """The cost of each unit of a chain, in train mode."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    duplicate = fake_copy(model, mode).train()
    named = dict(duplicate.named_parameters())
    dtype = next((p.dtype for p in named.values() if p.is_floating_point()), torch.float32)
    with mode:
        features = torch.empty(_BATCH, *chain.input_size, dtype=dtype)
    context: dict[str, Any] = {}
    costs = []
    for unit in chain:
        owned = [named[name] for name in unit.parameters]
        with mode, torch.enable_grad():
            features, saved = _saved_bytes(lambda unit=unit, x=features: unit(duplicate, x, context), owned)
        costs.append(Cost(saved / _BATCH, _trainable_bytes(owned)))
    return costs


def auxiliary_cost(
    auxiliary: nn.Module, output: tuple[int, ...], target: tuple[int, ...], image: tuple[int, ...]
) -> Cost:
    """The cost of an auxiliary net on a module's `output`, whose input has shape `target` (batch axes left out)."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    duplicate = fake_copy(auxiliary, mode).train()
    with mode, torch.enable_grad():
        features = torch.empty(_BATCH, *output, requires_grad=True)
        arguments = [torch.empty(_BATCH, *target), torch.empty(_BATCH, *image)]
        labels = torch.zeros(_BATCH, dtype=torch.long)
        _, saved = _saved_bytes(lambda: duplicate(features, *arguments, labels), list(duplicate.parameters()))
    return Cost(saved / _BATCH, _trainable_bytes(duplicate.parameters()))


def _trainable_bytes(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)


def _saved_bytes(run: Callable[[], Any], parameters: list[Tensor]) -> tuple[Any, int]:
    """Runs, and counts the bytes of the distinct storages that autograd keeps, parameters left out."""
    known = {p.untyped_storage()._cdata for p in parameters}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return result, sum(s.nbytes() for s in storages.values())
