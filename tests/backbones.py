"""The backbones that are promised, small, and what tests do with each."""

import functools

import timm
import torch
import torchvision
from torch import nn

from localprop.tracing.chains import chain
from localprop.tracing.units import Chain

IMAGE = (3, 64, 64)
RATES = {"num_classes": 5, "drop_rate": 0.1, "drop_path_rate": 0.1}


def _sequential():
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(inplace=True), nn.Dropout(0.1), nn.Conv2d(8, 4, 1), nn.SiLU(True)),
        *(nn.Flatten(), nn.Linear(4 * 14 * 14, 16), nn.ReLU(inplace=True), nn.Linear(16, 5)),
    )


# name: (units, keyword arguments that make it small)
TIMM = {
    "swin_tiny_patch4_window7_224": (10, {"img_size": 64, "window_size": 4, "depths": (1, 1, 2, 1)}),
    "swinv2_tiny_window8_256": (10, {"img_size": 64, "window_size": 4, "depths": (1, 1, 2, 1)}),
    "vit_tiny_patch16_224": (5, {"img_size": 64, "depth": 3}),
    "deit3_small_patch16_224": (5, {"img_size": 64, "depth": 3}),
    "eva02_tiny_patch14_224": (5, {"img_size": 64, "depth": 3, "patch_size": 16}),
    "vit_small_patch14_dinov2": (5, {"img_size": 64, "depth": 3, "patch_size": 16}),
    "vit_small_patch16_dinov3": (5, {"img_size": 64, "depth": 3}),
    "beit_base_patch16_224": (5, {"img_size": 64, "depth": 3, "embed_dim": 96, "num_heads": 3}),
    "naflexvit_base_patch16_gap": (5, {"depth": 3, "embed_dim": 96, "num_heads": 3}),
    "cait_xxs24_224": (6, {"img_size": 64, "depth": 3}),
    "xcit_nano_12_p16_224": (10, {"img_size": 64, "depth": 3}),
    "mvitv2_tiny": (12, {"img_size": 64}),
    "pvt_v2_b0": (10, {"depths": (1, 1, 2, 1)}),
    "davit_tiny": (15, {"depths": (1, 1, 2, 1)}),
    "hiera_tiny_224": (7, {"img_size": 64, "stages": (1, 1, 2, 1)}),
    "volo_d1_224": (23, {"img_size": 64}),
    "nest_tiny": (16, {"img_size": 64}),
    "maxvit_nano_rw_256": (7, {"img_size": 64, "depths": (1, 1, 2, 1)}),
    "coatnet_nano_rw_224": (8, {"img_size": 64, "depths": (1, 2, 2, 1)}),
    "mixer_s16_224": (10, {"img_size": 64}),
    "poolformer_s12": (17, {}),
    "convnext_tiny": (10, {"depths": (1, 1, 2, 1)}),
    "resnet18": (10, {}),
    "resnet50": (7, {"layers": (1, 1, 2, 1)}),
    "efficientnet_b0": (19, {}),
}
# Patch, width, depths, heads and window; image, patch, layers, heads, width and width of an MLP.
SWIN_T, VIT_B = ([4, 4], 96, [1, 1, 2, 1], [3, 6, 12, 24], [7, 7]), (64, 16, 3, 3, 96, 192)
OTHERS = {
    "torchvision swin_t": (10, lambda: torchvision.models.SwinTransformer(*SWIN_T, dropout=0.1, num_classes=5)),
    "torchvision vit_b_16": (5, lambda: torchvision.models.VisionTransformer(*VIT_B, dropout=0.1, num_classes=5)),
    "sequential": (5, _sequential),
}


@functools.cache
def built(name) -> nn.Module:
    torch.manual_seed(0)
    return OTHERS[name][1]() if name in OTHERS else timm.create_model(name, **TIMM[name][1], **RATES)


@functools.cache
def cut(name) -> tuple[nn.Module, Chain]:
    model = built(name)
    return model, chain(model, IMAGE)


def through_units(model, units, images):
    context = {}
    for unit in units:
        images = unit(model, images, context)
        assert images.shape[1:] == unit.shape
    return images


def trained(model, function, images):
    """Output, buffers and gradients of one training pass with a fixed seed; the model is left as it was."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(1)
    output = function(images)
    output.square().sum().backward()
    result = {"output": output.detach(), **{name: b.clone() for name, b in model.named_buffers()}}
    result |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.load_state_dict(before)
    model.zero_grad()
    return result


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
