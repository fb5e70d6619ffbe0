"""What CUDA's kernels and libraries allocate for themselves, and how its operations differ from the CPU's."""

import pytest
import timm
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from localprop import localize
from localprop.memory.cuda import matrix_product_buffers
from localprop.memory.kernels import kernels_of
from localprop.memory.measure import measured
from localprop.memory.speed import MACHINES
from localprop.memory.tracker import Tracker
from localprop.planning.simulation import simulate_step
from localprop.settings.config import OptimConfig

MIB = 2**20


def peak(run, *sizes):
    """Most bytes that a function of new tensors, of `sizes`, needs in addition to them."""
    with FakeTensorMode(), kernels_of("cuda"), Tracker(MACHINES["cuda"]) as tracker:
        tensors = [torch.empty(size, requires_grad=True) for size in sizes]
        before = tracker.used
        run(*tensors)
        return max(tracker.in_use()) - before


def test_the_backward_of_softmax_needs_one_more_map():
    def run(x):
        torch.softmax(x, -1).backward(torch.empty(256, 1024))

    assert peak(run, (256, 1024)) == 4 * MIB  # result, its gradient, their product, the gradient of x


def test_a_roll_of_two_axes_needs_one_more_map():
    assert peak(lambda x: torch.roll(x, 1, 1), (256, 32, 32)) == MIB
    assert peak(lambda x: torch.roll(x, (1, 1), (1, 2)), (256, 32, 32)) == 2 * MIB
    assert peak(lambda x: torch.roll(x.transpose(1, 2), 1, 1), (256, 32, 32)) == 2 * MIB  # first it is copied


def test_layer_norm_of_many_rows_adds_up_in_parts():
    def run(x, weight, bias):
        F.layer_norm(x, (32,), weight, bias).backward(torch.empty(2**17, 32))

    # Result, gradients of both, two statistics a row, and sums of each 32 rows for weight and bias.
    assert peak(run, (2**17, 32), (32,), (32,)) == 16 * 3 * MIB + MIB + MIB + 2 * 512


def test_dropout_keeps_a_mask_of_bytes():
    assert peak(lambda x: F.dropout(x, 0.5), (1024, 1024)) == 5 * MIB
    assert peak(lambda x: F.dropout(x, 0.5, training=False), (1024, 1024)) == 0


def test_the_allocator_gives_out_whole_blocks():
    assert peak(lambda: torch.empty(3)) == 512


def test_buffers_of_matrix_products_follow_the_environment(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
    assert matrix_product_buffers() == [(2 * 4096 + 8 * 16) * 1024] * 2
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, size in {(8, 0): 8 * MIB + 128 * 1024, (9, 0): 32 * MIB, (12, 0): 32 * MIB}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, found=capability: found)
        assert matrix_product_buffers() == [size, size]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("mixed", [False, True])
def test_the_predicted_peak_is_that_of_a_real_step_on_cuda(mixed):
    backbone = timm.create_model("swin_tiny_patch4_window7_224", num_classes=10)
    half = torch.bfloat16 if mixed else None
    net = localize(backbone, 4, "greedy", batch_size=64, amp_dtype=half, device="cuda", recompute=False)
    config = OptimConfig(batch_size=64, amp=mixed)
    predicted = simulate_step(net, config, 64, (3, 224, 224), "cuda").peak
    device = torch.device("cuda")
    optimizers = [torch.optim.AdamW(module.parameters(), fused=True) for module in net.to(device).train().local_modules]

    def step_module(k, _):
        optimizers[k].step()
        optimizers[k].zero_grad()

    def step():
        batch = [torch.randn(64, 3, 224, 224, device=device), torch.zeros(64, dtype=torch.long, device=device)]
        with torch.autocast("cuda", torch.bfloat16, enabled=mixed):
            net.backward(batch.pop(0), batch.pop(), after_module=step_module)

    step()
    with measured([], device) as measurement:
        step()
    assert predicted == pytest.approx(measurement.peak, rel=0.05 if mixed else 0.03)
