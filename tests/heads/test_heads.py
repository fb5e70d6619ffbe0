"""Every head on every layout: shapes, gradients, learning, and plain references."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from localprop.errors import ConfigError
from localprop.features import Layout
from localprop.heads import HEADS, build_head

CHANNELS, HEIGHT, WIDTH, CLASSES = 16, 4, 6, 10
LAYOUTS = {
    "NCHW": Layout("NCHW", CHANNELS, HEIGHT, WIDTH),
    "NHWC": Layout("NHWC", CHANNELS, HEIGHT, WIDTH),
    "NLC": Layout("NLC", CHANNELS, HEIGHT, WIDTH),
    "NLC+1": Layout("NLC", CHANNELS, HEIGHT, WIDTH, 1),
    "NLC+5": Layout("NLC", CHANNELS, HEIGHT, WIDTH, 5),
    "nest": Layout("NLC", CHANNELS, HEIGHT, WIDTH),
    "NC": Layout("NC", CHANNELS),
}
SHAPES = {
    "NCHW": (CHANNELS, HEIGHT, WIDTH),
    "NHWC": (HEIGHT, WIDTH, CHANNELS),
    "NLC": (24, CHANNELS),
    "NLC+1": (25, CHANNELS),
    "NLC+5": (29, CHANNELS),
    "nest": (4, 6, CHANNELS),
    "NC": (CHANNELS,),
}
# Those of a place in a network are in test_successor.py.
heads = pytest.mark.parametrize("name", [name for name in HEADS if not getattr(HEADS[name], "needs_place", False)])
layouts = pytest.mark.parametrize("case", LAYOUTS)


@heads
@layouts
def test_gradient_reaches_every_parameter_and_every_position(name, case):
    torch.manual_seed(0)
    layout = LAYOUTS[case]
    head = build_head(name, layout, CLASSES)
    features = torch.randn(8, *SHAPES[case], requires_grad=True)
    outputs = head(features)
    assert outputs.shape == (8, CLASSES)
    F.cross_entropy(outputs, torch.arange(8)).backward()
    for parameter_name, parameter in head.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name
    assert (layout.tokens(features.grad).abs().sum(2) > 0).all()


@heads
@layouts
def test_a_head_learns_random_labels(name, case):
    torch.manual_seed(0)
    head = build_head(name, LAYOUTS[case], CLASSES)
    features, labels = torch.randn(16, *SHAPES[case]), torch.randint(CLASSES, (16,))
    optimizer = torch.optim.Adam(head.parameters(), lr=0.03)
    losses = []
    for _ in range(25):
        loss = F.cross_entropy(head(features), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@heads
def test_the_same_seed_gives_the_same_head(name):
    features, outputs = torch.randn(4, *SHAPES["NHWC"]), []
    for _ in range(2):
        torch.manual_seed(7)
        outputs.append(build_head(name, LAYOUTS["NHWC"], CLASSES)(features))
    assert torch.equal(*outputs)


@heads
@pytest.mark.parametrize("case", ["NHWC", "NLC", "nest"])
def test_the_layout_does_not_matter_to_what_is_read(name, case):
    torch.manual_seed(0)
    reference, other = (build_head(name, LAYOUTS[c], CLASSES) for c in ("NCHW", case))
    other.load_state_dict(reference.state_dict())
    grid = torch.randn(4, *SHAPES["NCHW"])
    features = grid.permute(0, 2, 3, 1).reshape(4, *SHAPES[case])
    torch.testing.assert_close(other(features), reference(grid), rtol=1e-4, atol=1e-5)


def test_linear_is_norm_then_pool_then_linear():
    torch.manual_seed(0)
    head = build_head("linear", LAYOUTS["NLC+1"], CLASSES)
    nn.init.normal_(head.norm.weight)
    nn.init.normal_(head.norm.bias)
    features = torch.randn(3, 25, CHANNELS)
    weights = {key: value.double().numpy() for key, value in head.state_dict().items()}
    x = features.double().numpy()
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = x * weights["norm.weight"] + weights["norm.bias"]
    pooled = (x[:, 0] + x[:, 1:].mean(1)) / 2
    expected = pooled @ weights["fc.weight"].T + weights["fc.bias"]
    np.testing.assert_allclose(head(features).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_mlp_is_pool_then_norm_then_two_layers():
    torch.manual_seed(0)
    head = build_head("mlp", LAYOUTS["NHWC"], CLASSES)
    features = torch.randn(3, *SHAPES["NHWC"])
    _, first, _, second = head.mlp
    pooled = F.layer_norm(features.mean((1, 2)), (CHANNELS,))
    expected = F.gelu(pooled @ first.weight.T + first.bias) @ second.weight.T + second.bias
    torch.testing.assert_close(head(features), expected)


@heads
@pytest.mark.parametrize("case", ["NCHW", "NHWC", "NLC+1"])
def test_only_the_conv_head_saves_maps_for_backward(name, case):
    """Linear keeps the features, there anyway, and two numbers per position; mlp keeps vectors."""
    head, features = (
        build_head(name, LAYOUTS[case], CLASSES),
        torch.randn(2, *SHAPES[case], requires_grad=True),
    )
    sizes = []
    known = {t.untyped_storage().data_ptr() for t in [features, *head.parameters()]}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        head(features)
    per_position = LAYOUTS[case].tokens(features).shape[1]
    assert max(sizes) <= 2 * {"linear": max(per_position, CHANNELS), "mlp": CHANNELS}.get(name, 10**9)


@pytest.mark.parametrize(
    ("channels", "side", "width", "stride"),
    [(16, 32, 32, 2), (32, 16, 64, 2), (64, 8, 64, 1), (96, 56, 192, 2), (768, 14, 512, 2), (768, 7, 512, 1)],
)
def test_conv_has_infopros_widths(channels, side, width, stride):
    conv = build_head("conv", Layout("NCHW", channels, side, side), 128).conv
    assert conv.weight.shape == (width, channels, 3, 3)
    assert conv.stride == (stride, stride)


def test_an_unknown_head_gets_a_suggestion():
    with pytest.raises(ConfigError, match="no head is called 'liner'; did you mean 'linear'"):
        build_head("liner", LAYOUTS["NCHW"], CLASSES)
