"""End-to-end backpropagation, the baseline: one module, the whole backbone, trained by the task's loss."""

from localprop.network.loss import TaskLoss


class EndToEnd(TaskLoss):
    """The task's loss of the backbone's prediction. Allows one module only."""

    only_modules = 1
