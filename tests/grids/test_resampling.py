"""Interpolation and pooling as products against torch's own functions, values and gradients."""

import pytest
import torch
from torch.nn import functional as F

from localprop.grids.resampling import average_pooling, interpolation

SIZES = [(1, 1), (1, 5), (2, 3), (4, 4), (7, 5), (8, 16), (13, 1), (16, 12)]
pairs = pytest.mark.parametrize(("size", "new_size"), [(a, b) for a in SIZES for b in SIZES])


def check(resample, reference, size, new_size):
    torch.manual_seed(0)
    grid = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    given, expected = resample(grid), reference(grid)
    assert given.shape == (2, 3, *new_size)
    torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(expected)
    gradients = [torch.autograd.grad((value * weight).sum(), grid)[0] for value in (given, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pairs
@pytest.mark.parametrize("align_corners", [False, True])
def test_interpolation_is_that_of_torch(size, new_size, align_corners):
    def reference(grid):
        return F.interpolate(grid, new_size, mode="bilinear", align_corners=align_corners)

    check(interpolation(size, new_size, align_corners), reference, size, new_size)


@pairs
def test_pooling_is_that_of_torch(size, new_size):
    check(average_pooling(size, new_size), lambda grid: F.adaptive_avg_pool2d(grid, new_size), size, new_size)


@pytest.mark.parametrize("channels_last", [False, True])
def test_only_the_matrices_are_kept_for_backward(channels_last):
    resample, kept = interpolation((8, 8), (16, 16)).float(), []
    grid = torch.randn(2, 3, 8, 8, requires_grad=True)
    grid = grid.contiguous(memory_format=torch.channels_last) if channels_last else grid
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        resample(grid).sum()
    own = {buffer.untyped_storage().data_ptr() for buffer in resample.buffers()}
    assert kept
    assert {tensor.untyped_storage().data_ptr() for tensor in kept} == own


def test_the_result_has_the_type_of_the_grid_also_under_autocast():
    resample = interpolation((4, 4), (6, 6))
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            grid = torch.randn(2, 3, 4, 4).to(dtype)
            expected = F.interpolate(grid.float(), (6, 6), mode="bilinear")
            assert resample(grid).dtype == dtype
            tolerance = 1e-5 if dtype == torch.float32 else 0.03
            torch.testing.assert_close(resample(grid).float(), expected, rtol=tolerance, atol=tolerance)


def test_a_checkpoint_has_no_matrices():
    assert not interpolation((4, 4), (6, 6)).state_dict()
