"""Greedy local learning: each module learns to predict the label, and nothing else.

Source: Belilovsky et al., Decoupled Greedy Learning of CNNs (DGL), ICML 2020.
"""

from localprop.methods.common import Judging


class Greedy(Judging):
    """The criterion on the prediction of an auxiliary head."""
