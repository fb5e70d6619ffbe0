"""Simulations for CUDA cast as PyTorch's own autocast does on CUDA: on fake tensors, so without a GPU."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from localprop.memory.kernels import kernels_of
from localprop.memory.speed import MACHINES
from localprop.memory.tracker import Tracker

# Each is called with a map, a matrix and a vector of weights.
FUNCTIONS = {
    "linear": lambda x, w, v: F.linear(x, w, v),
    "linear without bias": lambda x, w, v: F.linear(x, w),
    "matmul": lambda x, w, v: x @ w,
    "einsum": lambda x, w, v: torch.einsum("abcd,de->abce", x, w),
    "layer norm": lambda x, w, v: F.layer_norm(x, (8,), v, v),
    "layer norm without weight": lambda x, w, v: F.layer_norm(x, (8,)),
    "group norm": lambda x, w, v: F.group_norm(x, 2),
    "batch norm": lambda x, w, v: F.batch_norm(x, None, None, v, v, training=True),
    "gelu": lambda x, w, v: F.gelu(x),
    "softmax": lambda x, w, v: F.softmax(x, -1),
    "softmax of a type": lambda x, w, v: F.softmax(x, -1, dtype=torch.bfloat16),
    "log softmax": lambda x, w, v: F.log_softmax(x, -1),
    "bilinear upsampling": lambda x, w, v: F.interpolate(x, size=(16, 16), mode="bilinear"),
    "nearest upsampling": lambda x, w, v: F.interpolate(x, size=(16, 16)),
    "average pool": lambda x, w, v: F.adaptive_avg_pool2d(x, 2),
    "mean": lambda x, w, v: x.mean((1, 2)),
    "sum": lambda x, w, v: x.sum(),
    "sum of axes": lambda x, w, v: x.sum((1, 2)),
    "normalize": lambda x, w, v: F.normalize(x, dim=-1),
    "norm": lambda x, w, v: x.norm(),
    "power": lambda x, w, v: x**2,
    "exp": lambda x, w, v: x.exp(),
    "cat": lambda x, w, v: torch.cat([x, w.expand(x.shape)]),
    "stack": lambda x, w, v: torch.stack([x, w.expand(x.shape)]),
    "addcmul": lambda x, w, v: torch.addcmul(x, x, w),
    "mse loss": lambda x, w, v: F.mse_loss(x, w.expand(x.shape)),
    "smooth l1 loss": lambda x, w, v: F.smooth_l1_loss(x, x),
    "cross entropy": lambda x, w, v: F.cross_entropy(x, torch.empty(4, 8, 8, dtype=torch.long, device=x.device)),
    "binary cross entropy": lambda x, w, v: F.binary_cross_entropy_with_logits(x, w.expand(x.shape)),
    "reflection": lambda x, w, v: F.pad(x, (1, 1, 1, 1), mode="reflect"),
}


def tensors(device, dtype):
    return (
        torch.empty(4, 8, 8, 8, device=device, dtype=dtype),
        torch.empty(8, 8, device=device),
        torch.empty(8, device=device),
    )


@pytest.fixture
def cuda_autocast():
    """Enables PyTorch's own autocast on CUDA, which `torch.autocast` refuses without a GPU."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    yield
    torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_results_have_the_types_that_autocast_gives_on_cuda(function, dtype, cuda_autocast):
    with FakeTensorMode():
        expected = function(*tensors("cuda", dtype)).dtype
        with kernels_of("cuda"), torch.autocast("cpu", torch.bfloat16):
            assert function(*tensors("cpu", dtype)).dtype == expected


def test_convolutions_run_in_half_precision():
    with FakeTensorMode(), kernels_of("cuda"), torch.autocast("cpu", torch.bfloat16):
        x, w, _ = tensors("cpu", torch.float32)
        assert F.conv2d(x, w.view(8, 8, 1, 1)).dtype == torch.bfloat16
        assert F.conv_transpose2d(x, w.view(8, 8, 1, 1)).dtype == torch.bfloat16


def test_an_operation_that_autocast_forbids_on_cuda_is_forbidden():
    with FakeTensorMode(), kernels_of("cuda"), torch.autocast("cpu", torch.bfloat16):
        x, _, _ = tensors("cpu", torch.float32)
        with pytest.raises(RuntimeError, match="unsafe to autocast"):
            F.binary_cross_entropy(x, x)


def test_nothing_is_cast_outside_of_autocast_or_of_the_simulation():
    with FakeTensorMode():
        x, w, _ = tensors("cpu", torch.float32)
        with kernels_of("cuda"):
            assert F.linear(x, w).dtype == torch.float32
            with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
                assert F.linear(x, w).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert F.layer_norm(x.bfloat16(), (8,)).dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("ipu")


def test_weights_are_cast_once_until_the_cache_is_cleared():
    with FakeTensorMode(), kernels_of("cuda"):
        layer = nn.Linear(8, 8, bias=False)
        x = torch.empty(2, 8)
        with Tracker(MACHINES["cuda"]) as tracker, torch.autocast("cpu", torch.bfloat16):
            tracker.label([x, layer.weight], "given")
            counts = []
            for clear in (False, True, False):
                layer(x), layer(x)
                counts.append(sum(allocation.shape == (8, 8) for allocation in tracker.allocations))
                if clear:
                    torch.clear_autocast_cache()
    assert counts == [2, 2, 3]  # the weight itself, and its casts


def test_gradients_have_the_types_of_their_tensors():
    with FakeTensorMode(), kernels_of("cuda"), torch.autocast("cpu", torch.bfloat16):
        norm, layer = nn.LayerNorm(8), nn.Linear(8, 8)
        x = torch.empty(2, 8, dtype=torch.bfloat16, requires_grad=True)
        layer(norm(x)).sum().backward()
        assert x.grad.dtype == torch.bfloat16
        assert {p.grad.dtype for p in [*norm.parameters(), *layer.parameters()]} == {torch.float32}


@pytest.mark.parametrize("axes", [3, 5])
@pytest.mark.parametrize("mixed", [False, True])
def test_attention_has_any_number_of_axes(axes, mixed):
    with FakeTensorMode(), kernels_of("cuda"), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        query = torch.empty(*[2] * (axes - 2), 6, 8, requires_grad=True)
        attended = F.scaled_dot_product_attention(query, query, query)
        assert attended.shape == query.shape
        assert attended.dtype == (torch.bfloat16 if mixed else torch.float32)
        attended.sum().backward()
        assert query.grad.shape == query.shape
