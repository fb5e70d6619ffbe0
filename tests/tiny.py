"""Tiny models that tests share: one of every kind, for 5 labels of 32 x 32 pixels, with dropout where they have it."""

import functools
from contextlib import contextmanager
from unittest import mock

import timm
import torch
from torch import nn

from localprop import chain, localize
from localprop.division import divide
from localprop.memory.measure import measured, total_bytes
from localprop.memory.recompute import recomputing
from localprop.tracing.copies import tensors_of

CLASSES = 5
SIZE = (3, 32, 32)


def _swin():
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        patch_size=2,
        window_size=4,
        embed_dim=24,
        depths=(2, 1),
        num_heads=(1, 2),
        num_classes=CLASSES,
        drop_path_rate=0.3,
        proj_drop_rate=0.1,
    )


def _vit():
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=4,
        depth=4,
        embed_dim=48,
        num_heads=3,
        num_classes=CLASSES,
        drop_path_rate=0.3,
        proj_drop_rate=0.1,
    )


def _resnet():
    return timm.create_model(
        "resnet18",
        layers=(1, 1, 1, 1),
        channels=(16, 16, 32, 32),
        num_classes=CLASSES,
        drop_path_rate=0.3,
        drop_rate=0.1,
    )


def _mlp():
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(3072, 24), nn.GELU(), nn.Dropout(0.1)),
        *(nn.Linear(24, 32), nn.GELU(), nn.Dropout(0.1)),
        *(nn.Linear(32, 16), nn.Tanh()),
        nn.Linear(16, CLASSES),
    )


def _cnn():
    return nn.Sequential(
        *(nn.Conv2d(3, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Conv2d(12, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout2d(0.1)),
        *(nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.BatchNorm2d(24), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, CLASSES)),
    )


MODELS = {"swin": _swin, "vit": _vit, "resnet": _resnet, "mlp": _mlp, "cnn": _cnn}

# Where to cut for 2 and for 3 modules: given by name, for a balanced partition takes longer to find.
CUTS = {
    "swin": {2: ["layers.0.blocks.1"], 3: ["layers.0.blocks.0", "layers.0.blocks.1"]},
    "vit": {2: ["blocks.1"], 3: ["blocks.0", "blocks.2"]},
    "resnet": {2: ["layer2"], 3: ["layer1", "layer3"]},
    "mlp": {2: ["4"], 3: ["1", "4"]},
    "cnn": {2: ["3"], 3: ["0", "3"]},
}


def build(name):
    """The model `name`, with the same weights each time; the random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[name]()


@functools.cache
def units_of(name):
    """The chain of the model `name`; it serves every copy."""
    return chain(build(name), SIZE)


@contextmanager
def traced_once(name):
    """Inside, `localize` takes the chain of the model `name` from before: tracing takes longer than all the rest."""
    with mock.patch.object(divide, "chain", return_value=units_of(name)):
        yield


def split(name, modules=3, method="feature-reconstruction", model=None, reach=0, **options):
    """A tiny model as a network of 2 or 3 modules, with the same weights each time; by default no head reads ahead."""
    model = build(name) if model is None else model
    torch.manual_seed(1)
    with traced_once(name):
        return localize(model, method=method, cuts=CUTS[name][modules], input_size=SIZE, reach=reach, **options)


def batch(size=4, seed=0):
    """Images and labels; the first two share theirs."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, *SIZE, generator=generator)
    return images, torch.arange(size).clamp(min=1) % CLASSES


def gradients(net):
    """Copies of the gradients that there are, by the names of their parameters."""
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def assert_same(a, b):
    """Two mappings have the same names, and tensors of the same bits."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def module_peaks(net, images, labels, amp=False):
    """Bytes that each module's forward and backward take at most, beside its input, by the allocator's account."""
    peaks, features, context = [], images, {}
    for module in net.local_modules:
        held = [*net.parameters(), *net.buffers(), images, labels, features, *tensors_of(context)]
        with measured(held, torch.device("cpu")) as measurement:
            with torch.autocast("cpu", torch.bfloat16, enabled=amp), recomputing(module.recompute):
                output = module(features, context)
                loss, logits = module.local_loss(output, features, images, labels)
            torch.clear_autocast_cache()
            loss.backward()
            after = output.detach()
            del output, loss, logits
        peaks.append(measurement.peak - total_bytes(held))
        features = after
        net.zero_grad()
    return peaks
