"""Which layer is at work: in forward, in backward, and where a forward runs again."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from localprop.memory.layers import Layers
from localprop.memory.tracker import Tracker


def model():
    return nn.Sequential(nn.Linear(8, 64), nn.Sequential(nn.Tanh(), nn.Linear(64, 32)), nn.Linear(32, 1))


def followed(run, net):
    """What a tracker saw of `run`: (layer, whether in backward, whether in a forward, shape) of each allocation."""
    layers = Layers()
    tracker = Tracker(layers=layers)
    images = torch.rand(16, 8)
    with tracker, layers.following(net.named_modules()):
        run(images).sum().backward()
    assert layers.at_work() is None
    return [(a.layer, tracker.events[a.start].backward, a.forward, a.shape) for a in tracker.allocations]


def test_forward_is_the_innermost_modules_and_backward_is_that_of_who_made_the_node():
    net = model()
    seen = followed(net, net)
    assert ("0", False, True, (16, 64)) in seen
    assert ("1.0", False, True, (16, 64)) in seen
    assert ("1.1", False, True, (16, 32)) in seen
    assert ("2", True, False, (16, 32)) in seen  # the gradient of what it was given
    assert ("1.1", True, False, (16, 64)) in seen
    assert ("1.0", True, False, (16, 64)) in seen
    assert ("0", True, False, (64, 8)) in seen  # and of its weight
    assert {layer for layer, *_ in seen} <= {None, "0", "1.0", "1.1", "2", "0.weight", "1.1.weight", "2.weight"}


def test_what_runs_again_in_backward_is_told_apart():
    net = model()
    seen = followed(lambda images: checkpoint(net, images, use_reentrant=False), net)
    again = {layer for layer, backward, forward, _ in seen if backward and forward}
    assert {"0", "1.0", "1.1"} <= again
    assert ("1.1", True, False, (16, 64)) in seen


def test_modules_are_left_as_they_were():
    net = model()
    followed(net, net)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
