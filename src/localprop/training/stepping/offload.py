"""Optimizer states that rest on the host: the device holds those of one local module at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

_LEAST = 16 << 10
"""Bytes of a tensor below which a copy costs more than its memory is worth: it stays on the device."""


class Offload:
    """Keeps the optimizer states of modules at rest in pinned memory of the host.

    States travel on a stream of their own: a module's state comes in while its forward and backward run, and goes out
    while the next module's do. The copies change no bit.

    Args:
        optimizers: one per module, stepped in this order.
        device: where the parameters are: CUDA; anything else copies without a stream, for tests.
        least: bytes of the smallest tensor that is moved.
        backwards: whether they are stepped in the opposite order.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        device: torch.device,
        least: int = _LEAST,
        backwards: bool = False,
    ) -> None:
        self.optimizers, self.device, self.least = optimizers, device, least
        order = list(range(len(optimizers)))[:: -1 if backwards else 1]
        self.first, self._next = order[0], dict(pairwise(order))
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._away: list[list[tuple[Any, Any]]] = [[] for _ in optimizers]
        for k in range(len(optimizers)):
            self.release(k)  # some have a state before their first step

    def fetch(self, k: int) -> None:
        """Begins to bring module k's state in; nothing happens if that has been done."""
        # Copies in take memory that only this stream uses, and that copies out gave back in its order.
        with torch.cuda.stream(self.stream):
            for container, key in self._away[k]:
                container[key] = _each_plain(container[key], self._to_device)
        self._away[k] = []

    @contextmanager
    def present(self, k: int) -> Iterator[None]:
        """Inside, module k's state is on the device; afterwards it goes out, and that of the next begins to come."""
        self.fetch(k)
        if self.stream:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        yield
        self.release(k)
        if k in self._next:
            self.fetch(self._next[k])

    def release(self, k: int) -> None:
        """Sends module k's state out, all of which is on the device."""
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        self._away[k] = list(self._movable(self.optimizers[k].state))
        with torch.cuda.stream(self.stream):
            for container, key in self._away[k]:
                container[key] = _each_plain(container[key], self._to_host)

    def synchronize(self) -> None:
        """Waits until everything sent out is there and may be read."""
        if self.stream:
            self.stream.synchronize()

    def _movable(self, container: Any) -> Iterator[tuple[Any, Any]]:
        """(dict or list, key) of each tensor on the device that is large enough."""
        for key, value in container.items() if isinstance(container, dict) else enumerate(container):
            if isinstance(value, (dict, list)):
                yield from self._movable(value)
            elif isinstance(value, Tensor) and value.device.type == self.device.type and value.nbytes >= self.least:
                yield container, key

    def _to_host(self, tensor: Tensor) -> Tensor:
        host = torch.empty_like(tensor, device="cpu", pin_memory=self.stream is not None)
        host.copy_(tensor, non_blocking=True)
        if self.stream:
            tensor.record_stream(self.stream)  # its memory is free once the copy is done
        return host

    def _to_device(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=self.device).copy_(tensor, non_blocking=True)


def _each_plain(tensor: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Applies `function` to a tensor, or to those that a wrapper (a quantized moment) is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return function(tensor)
    names, context = tensor.__tensor_flatten__()
    inner = {name: _each_plain(getattr(tensor, name), function) for name in names}
    return type(tensor).__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())  # type: ignore[attr-defined]
