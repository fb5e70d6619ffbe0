"""What one backward pass of a network gives."""

from dataclasses import dataclass

from torch import Tensor

from localprop.errors import warn_renamed


@dataclass(frozen=True)
class LocalOutput:
    """What one `LocalNetwork.backward` computed.

    Attributes:
        losses: (K,) local losses, detached; in exact training (1,) that of the network.
        predictions: what each module's head predicts, detached, if that is a vector per example; None where it has no
            head. The last is the network's own prediction, of any shape; in exact training there is no other.
    """

    losses: Tensor
    predictions: list[Tensor | None]

    @property
    def prediction(self) -> Tensor:
        """(B, ...) prediction of the network, detached."""
        prediction = self.predictions[-1]
        assert prediction is not None  # the last module predicts
        return prediction

    @property
    def logits(self) -> Tensor:
        """(B, C) logits of a network that classifies, detached: its prediction."""
        return self.prediction

    @property
    def module_logits(self) -> list[Tensor | None]:
        """Name of `predictions` in version 0.1."""
        warn_renamed("LocalOutput.module_logits", "LocalOutput.predictions")
        return self.predictions
