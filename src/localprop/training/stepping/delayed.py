"""Copies numbers from a device to the host, which does not wait for them."""

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Delayed(Generic[T]):
    """Reads the numbers of steps when they have arrived, in the order of the steps.

    Args:
        device: where they are made.
        most: how many steps may be on their way; with more, the host waits for the oldest. So it never gets far ahead
            of the device.
    """

    def __init__(self, device: torch.device, most: int) -> None:
        self._cuda, self._most = device.type == "cuda", most
        self._pending: deque[tuple[T, Tensor, torch.cuda.Event | None]] = deque()

    def add(self, step: T, numbers: Tensor) -> None:
        """Starts the copy of a step's numbers, a vector."""
        if not self._cuda:
            self._pending.append((step, numbers.detach().clone(), None))
            return
        host = torch.empty_like(numbers, device="cpu", pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(numbers.device))  # which need not be the current device
        self._pending.append((step, host, event))

    def arrived(self) -> Iterator[tuple[T, list[float]]]:
        """The steps whose numbers have arrived; it waits for the oldest where too many are on their way."""
        while self._pending and (len(self._pending) > self._most or self._is_there(self._pending[0][2])):
            yield self._next()

    def rest(self) -> Iterator[tuple[T, list[float]]]:
        """All other steps; it waits for their numbers."""
        while self._pending:
            yield self._next()

    def _is_there(self, event: torch.cuda.Event | None) -> bool:
        return event is not None and event.query()

    def _next(self) -> tuple[T, list[float]]:
        step, numbers, event = self._pending.popleft()
        if event is not None:
            event.synchronize()
        return step, numbers.tolist()
