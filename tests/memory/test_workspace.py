"""What kernels take for themselves: told of fake tensors, against the allocator's account of real ones."""

from functools import partial
from itertools import accumulate

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from localprop.memory.measure import allocated_changes
from localprop.memory.workspace import workspace

aten = torch.ops.aten
BF16 = torch.bfloat16


def told(func, args):
    with FakeTensorMode() as mode:
        return workspace(func, tree_map_only(torch.Tensor, mode.from_tensor, args))


def taken(func, args):
    changes, result = allocated_changes(lambda: func(*args))
    del result
    return max(accumulate(changes), default=0) - sum(changes)


def conv(batch, dtype=torch.float32, width=16, kernel=3, stride=1, groups=1, last=False):
    x = torch.randn(batch, width, 14, 14, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    weight = torch.randn(24, width // groups, kernel, kernel, dtype=dtype)
    return x, weight, torch.randn(24, dtype=dtype), [stride] * 2, [kernel // 2] * 2, [1, 1], False, [0, 0], groups


def conv_backward(batch, **options):
    args = conv(batch, **options)
    gradient = torch.randn_like(aten.convolution(*args))
    return gradient, *args[:2], [24], *args[3:], [True] * 3


def norm_backward(batch, dtype=torch.float32, spread=False):
    x, weight = torch.randn(batch, 8, 6, 6, dtype=dtype), torch.ones(8)
    _, mean, deviation = aten.native_batch_norm(x, weight, weight, None, None, True, 0.1, 1e-5)
    gradient = torch.randn(batch, 8, 1, 1, dtype=dtype).expand_as(x) if spread else torch.randn_like(x)
    return gradient, x, weight, weight, weight, mean, deviation, True, 1e-5, [True] * 3


def turned(*size, dtype=torch.float32):
    return torch.randn(*size, dtype=dtype).transpose(0, 1)


OPTIONS = {
    "3x3": {},
    "1x1": {"kernel": 1},
    "channels last": {"stride": 2, "last": True},
    "groups": {"groups": 8},
    "half precision": {"dtype": BF16},
}
CASES = {
    **{f"conv, {name}": (aten.convolution.default, partial(conv, **options)) for name, options in OPTIONS.items()},
    **{
        f"conv backward, {name}": (aten.convolution_backward.default, partial(conv_backward, **options))
        for name, options in OPTIONS.items()
    },
    "norm backward": (aten.native_batch_norm_backward.default, norm_backward),
    "norm backward, spread": (aten.native_batch_norm_backward.default, partial(norm_backward, spread=True)),
    "norm backward, half precision": (aten.native_batch_norm_backward.default, partial(norm_backward, dtype=BF16)),
    "upsampling": (aten.upsample_bilinear2d.default, lambda n: (torch.randn(n, 8, 4, 4), [8, 8], False)),
    "entropy": (
        aten.binary_cross_entropy_with_logits.default,
        lambda n: (torch.randn(n, 3, 8, 8), torch.rand(n, 3, 8, 8), None, None, 1),
    ),
    "layer norm": (aten.native_layer_norm.default, lambda n: (turned(32, n, 8), [8], None, None, 1e-5)),
    "layer norm in order": (aten.native_layer_norm.default, lambda n: (torch.randn(n, 32, 8), [8], None, None, 1e-5)),
    "roll": (aten.roll.default, lambda n: (torch.randn(n, 8, 8, 4), [1, 1], [1, 2])),
    "roll of an axis": (aten.roll.default, lambda n: (torch.randn(n, 8, 8, 4), [1], [1])),
    "product": (aten.mm.default, lambda n: (torch.randn(n, 64), torch.randn(64, 64))),
    "activation": (aten.gelu.default, lambda n: (torch.randn(n, 64),)),
}


@pytest.mark.parametrize("batch", [1, 5, 16])
@pytest.mark.parametrize("case", CASES)
def test_workspace_of_a_few_images_is_what_the_kernel_takes(case, batch):
    func, make = CASES[case]
    args = make(batch)
    assert told(func, args) == taken(func, args)


@pytest.mark.parametrize("batch", [32, 100])
@pytest.mark.parametrize("case", CASES)
def test_workspace_of_more_images_is_nearly_so(case, batch):
    func, make = CASES[case]
    args = make(batch)
    assert told(func, args) == pytest.approx(taken(func, args), rel=0.05)


def test_some_kernels_take_workspace_and_some_do_not():
    sizes = {case: told(func, make(16)) for case, (func, make) in CASES.items()}
    without = {"layer norm in order", "roll of an axis", "product", "activation"}
    assert {case for case, size in sizes.items() if size == 0} - {"conv, 1x1", "conv backward, 1x1"} == without


def test_workspace_never_shrinks_below_that_of_a_few_images():
    """That of this convolution is a little smaller for 16 images than for one, and no more for more."""
    make = partial(conv, stride=2, last=True)
    assert told(aten.convolution.default, make(4096)) == told(aten.convolution.default, make(16)) > 0


def test_autocast_changes_no_workspace():
    args = conv(4)
    expected = told(aten.convolution.default, args)
    with torch.autocast("cpu", BF16):
        assert told(aten.convolution.default, args) == expected
