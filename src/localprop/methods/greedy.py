"""Greedy local learning: each module learns to predict the label, and nothing else.

Source: Belilovsky et al., Decoupled Greedy Learning of CNNs (DGL), ICML 2020.
"""

from localprop.network.loss import HeadLoss, ModuleSpec


class Greedy(HeadLoss):
    """The criterion on the prediction of an auxiliary head."""

    uses_inputs = False

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__(spec)
        self.head = spec.build_head()
