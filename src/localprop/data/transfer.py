"""Brings batches to the device without a wait: a thread prefetches them, and they are copied from pinned memory."""

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; the host does not wait for a copy to a GPU.

    Torch keeps the pinned memory until the copy is over, and then uses it for the next one.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def prefetch(items: Generator[T, None, None], most: int = 2) -> Generator[T, None, None]:
    """Gives the same items; a thread makes them before they are asked for.

    The thread ends with the last item, or when the generator is closed. An error that `items` raises is raised in the
    place of the item.

    Args:
        items: the generator that makes them; closed at the end.
        most: how many are made ahead.
    """
    end = object()
    thread = ThreadPoolExecutor(1)
    try:
        waiting = deque(thread.submit(next, items, end) for _ in range(most))
        while True:
            item = waiting.popleft().result()
            if item is end:
                return
            waiting.append(thread.submit(next, items, end))
            yield item  # type: ignore[misc]
            del item  # else it would be kept while the next is made
    finally:
        thread.shutdown(cancel_futures=True)
        items.close()
