"""End-to-end backpropagation, the baseline: one module, the whole backbone, trained by its own classifier's loss."""

from localprop.network.network import Classification


class EndToEnd(Classification):
    """The criterion on the backbone's logits. Allows one module only."""

    only_modules = 1
