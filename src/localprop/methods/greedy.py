"""Greedy local learning: each module learns to predict the label, and nothing else.

Source: Belilovsky et al., Decoupled Greedy Learning of CNNs (DGL), ICML 2020.
"""

from torch import Tensor

from localprop.network.loss import LocalLoss, ModuleSpec


class Greedy(LocalLoss):
    """The criterion on the prediction of an auxiliary head."""

    uses_inputs = False

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__()
        self.task = spec.task
        self.head = spec.build_head()

    def forward(
        self, output: Tensor, features: Tensor, inputs: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `LocalLoss.forward`."""
        prediction = self.head(output)
        return self.task.loss(prediction, targets), prediction

    def predict(self, output: Tensor) -> Tensor:
        """The head's prediction."""
        return self.head(output)
