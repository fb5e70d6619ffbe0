"""What units and auxiliary nets take in a training step, found by running them on fake tensors: no data, no GPU."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from localprop.chain import Chain
from localprop.tracing import fake_copy

_BATCH = 32  # costs are per image: what a batch shares (bias tables, batch norm's statistics) spreads over so many


@dataclass(frozen=True)
class Cost:
    """The cost of a part of a network.

    Attributes:
        saved: bytes kept from forward for backward, per image; parameters and buffers, which exist anyway, left out.
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
    """The cost of each unit of a chain, in train mode.

    A tensor between two units that either of them keeps is counted once, as the input of the second: so the costs
    of consecutive units add up.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    duplicate = fake_copy(model, mode).train()
    dtype = next((p.dtype for p in duplicate.parameters() if p.is_floating_point()), torch.float32)
    with mode:
        features = torch.empty(_BATCH, *chain.input_size, dtype=dtype)
    context: dict[str, Any] = {}
    boundary: dict[int, int] = {}
    costs = []
    for unit in chain:
        with mode, torch.enable_grad():
            features, saved = _run(duplicate, unit, duplicate, features, context)
        saved |= boundary
        address = features.untyped_storage()._cdata
        boundary = {address: saved.pop(address)} if address in saved else {}
        owned = [duplicate.get_parameter(name) for name in unit.parameters]
        costs.append(Cost(sum(saved.values()) / _BATCH, _trainable_bytes(owned)))
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
        _, saved = _run(duplicate, duplicate, features, *arguments, labels)
    return Cost(sum(saved.values()) / _BATCH, _trainable_bytes(duplicate.parameters()))


def _trainable_bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)


def _run(owner: nn.Module, part: Callable[..., Any], *arguments: Any) -> tuple[Any, dict[int, int]]:
    """Runs a part of `owner`; gives its result, and the bytes of each storage that autograd keeps."""
    static = {t.untyped_storage()._cdata for t in [*owner.parameters(), *owner.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}  # storages, not sizes: a freed one's address may be used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in static:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = part(*arguments)
    return result, {address: storage.nbytes() for address, storage in kept.items()}
