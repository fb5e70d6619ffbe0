"""Greedy local learning: each module learns to predict the label, and nothing else.

Source: Belilovsky et al., Decoupled Greedy Learning of CNNs (DGL), ICML 2020.
"""

from torch import Tensor

from localprop.heads import build_head
from localprop.network.network import LocalLoss, ModuleSpec


class Greedy(LocalLoss):
    """The criterion on the prediction of an auxiliary head."""

    uses_images = False

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__()
        self.criterion = spec.criterion
        self.head = build_head(spec.head, spec.output, spec.num_classes)

    def forward(self, output: Tensor, inputs: Tensor, images: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See `LocalLoss.forward`."""
        logits = self.head(output)
        return self.criterion(logits, labels), logits

    def classify(self, output: Tensor) -> Tensor:
        """The head's logits."""
        return self.head(output)
