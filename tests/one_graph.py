"""End-to-end training of a divided network as one graph: the reference of exact training."""

import torch
from torch.utils.checkpoint import checkpoint

from localprop.seeding import derive_seed


def one_graph(net, images, labels, seed, parts=1, again=False, half=False):
    """End-to-end training with one graph over all modules, or over their checkpoints. Adds to `.grad`.

    Returns:
        The loss and the prediction.
    """
    context, features, energies = {}, images, []

    def forward(x, k):
        torch.manual_seed(derive_seed(seed, "module", k))
        own = []
        return net.local_modules[k](x, context, 0, None, own), *own

    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        for k in range(len(net.local_modules)):
            run = checkpoint(forward, features, k, use_reentrant=False) if again else forward(features, k)
            features, *own = run
            energies += own
        loss = sum(energies, net.task.loss(features, labels))
        share = loss / parts if parts > 1 else loss
    share.backward()
    return loss.detach(), features.detach()
