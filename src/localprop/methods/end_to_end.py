"""End-to-end backpropagation by the task's loss: the baseline with one module, exact training with several."""

from localprop.network.loss import NoLoss


class EndToEnd(NoLoss):
    """A module before the last has no loss of its own; see `localprop.network.exact`."""

    usual_modules = 1
