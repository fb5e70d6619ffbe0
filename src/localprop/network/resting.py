"""Boundaries of exact training that rest on the host until their module runs again."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor


class Resting:
    """A boundary on its way to the host and back.

    Args:
        boundary: the boundary, on the device.
    """

    def __init__(self, boundary: Tensor) -> None:
        self._needs_gradient = boundary.requires_grad
        self._back: Tensor | None = None

    def settle(self) -> None:
        """Lets the device wait for the copy that was begun last; then what was copied may be freed, or used."""
        raise NotImplementedError

    def fetch(self) -> None:
        """Begins to bring the boundary back; nothing happens if that has been done."""
        if self._back is None:
            self._back = self._returning()

    def _returning(self) -> Tensor:
        """The boundary on the device, once `settle` has waited."""
        raise NotImplementedError

    def take(self) -> Tensor:
        """The boundary on the device, bit for bit, to be used at once."""
        self.fetch()
        self.settle()
        back, self._back = self._back, None
        assert back is not None
        return back.requires_grad_(self._needs_gradient)


Away = Callable[[Tensor], Resting]
"""Sends a boundary to the host."""


class OnHost(Resting):
    """A boundary in the host's pinned memory.

    It travels on a stream of its own: out while the module that it enters runs for the first time, and back while the
    optimizer of the module behind steps. So it is never on the device beside the activations of another module.

    Args:
        boundary: the boundary. Its copy begins now.
        stream: on which it travels; None copies at once, for tests without CUDA.
    """

    def __init__(self, boundary: Tensor, stream: torch.cuda.Stream | None = None) -> None:
        super().__init__(boundary)
        self._stream, self._device = stream, boundary.device
        self._host = torch.empty_like(boundary, device="cpu", pin_memory=stream is not None, requires_grad=False)
        self._copy(self._host, boundary)

    def _copy(self, to: Tensor, source: Tensor) -> None:
        if self._stream:  # what it reads is computed before, and what it overwrites is no longer read
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.no_grad(), torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)

    def settle(self) -> None:
        """See `Resting.settle`."""
        if self._stream:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _returning(self) -> Tensor:
        back = torch.empty_like(self._host, device=self._device)
        self._copy(back, self._host)
        return back


def to_host(device: torch.device) -> Away | None:
    """What sends the boundaries of one network to the host, all on the same stream; None where the device is no GPU."""
    return partial(OnHost, stream=torch.cuda.Stream(device)) if device.type == "cuda" else None
