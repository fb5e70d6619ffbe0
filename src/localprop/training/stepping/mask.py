"""Checks on the device whether everything is finite, so that no optimizer waits for the host."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Mask:
    """Masks all steps of all optimizers from the first loss or gradient on that is not finite.

    Args:
        parameters: those of each module that is trained.
        device: where they are.

    Attributes:
        failed: 0, or 1 from the first failure on: the `found_inf` of fused optimizers.
        flags: (modules,) 1 for the module in which the first failure was, else 0.
    """

    def __init__(self, parameters: Sequence[Sequence[nn.Parameter]], device: torch.device) -> None:
        self.failed = torch.zeros((), device=device)
        self.flags = torch.zeros(len(parameters), device=device)
        self._norms = [torch.zeros(len(own), dtype=torch.float64, device=device) for own in parameters]

    def note_loss(self, i: int, loss: Tensor) -> None:
        """Checks the loss of the i-th module."""
        self.note(i, ~loss.isfinite())

    def note(self, i: int, bad: Tensor) -> None:
        """Notes whether something of the i-th module is not finite: a boolean scalar."""
        number = bad.to(self.failed.dtype)
        self.flags[i].add_(number * (1 - self.failed))
        self.failed.copy_(torch.maximum(self.failed, number))

    def gradient_norm(self, i: int, gradients: Sequence[Tensor | None]) -> Tensor:
        """The 2-norm of all gradients of a module, in float64: it is finite if every element is.

        The norm of each gradient is kept as it was at the first failure, to find the gradient that was not finite.

        Args:
            i: the module.
            gradients: that of each parameter; None where it has none.
        """
        numbers = [number for number, gradient in enumerate(gradients) if gradient is not None]
        given = [gradient for gradient in gradients if gradient is not None]
        norms = torch.stack(torch._foreach_norm(given, 2, dtype=torch.float64))
        for run in _runs(numbers):
            kept = self._norms[i][numbers[run.start] : numbers[run.stop - 1] + 1]
            kept.copy_(torch.where(self.failed > 0, kept, norms[run.start : run.stop]))
        return torch.linalg.vector_norm(norms)

    def not_finite(self, i: int) -> int | None:
        """The number of the first parameter whose gradient was not finite at the failure; None where all were."""
        found = (~self._norms[i].isfinite()).nonzero()
        return int(found[0]) if len(found) else None

    def reset(self) -> None:
        """Forgets the failure."""
        for tensor in (self.failed, self.flags, *self._norms):
            tensor.zero_()


def _runs(numbers: list[int]) -> list[range]:
    """The parts of an ascending list in which each number is one more than the number before."""
    starts = [place for place, number in enumerate(numbers) if not place or numbers[place - 1] + 1 != number]
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(numbers)], strict=True)]
