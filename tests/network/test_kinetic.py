"""The kinetic energy of a block: its value, its gradients, and what it keeps."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from localprop.memory.measure import allocated_changes
from localprop.network.kinetic import kinetic_energy


def pair(size, dtype=torch.float32):
    generator = torch.Generator().manual_seed(size)
    before, step = (torch.randn(size, 5, 4, 12, generator=generator) for _ in range(2))
    return (before + 0.1 * step).to(dtype).requires_grad_(), before.to(dtype).requires_grad_()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_energy_and_its_gradients(size, dtype):
    output, features = pair(size, dtype)
    value = kinetic_energy(output, features)
    (0.3 * value).backward()
    after, before = (tensor.detach().double().requires_grad_() for tensor in (output, features))
    expected = F.mse_loss(after, before)
    (0.3 * expected).backward()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    for own, wanted in ((output, after), (features, before)):
        assert own.grad.dtype == dtype
        # In half precision the difference is rounded, and its product with the factor.
        tolerance = {"rtol": 1e-5, "atol": 1e-9} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-7}
        torch.testing.assert_close(own.grad.double(), wanted.grad, **tolerance)


def test_it_needs_no_gradient_of_its_input():
    output, features = pair(3)
    (both,) = torch.autograd.grad(kinetic_energy(output, features), output)
    kinetic_energy(output, features.detach()).backward()
    assert torch.equal(output.grad, both)
    output, features = pair(3)
    kinetic_energy(output.detach(), features).backward()
    torch.testing.assert_close(features.grad, -both, rtol=0, atol=0)


def test_types_may_differ():
    output, features = pair(4, torch.bfloat16)[0], pair(4)[1]
    kinetic_energy(output, features).backward()
    assert (output.grad.dtype, features.grad.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(features.grad, -output.grad.float(), rtol=2**-7, atol=1e-7)


def test_a_changed_output_is_noticed():
    output, features = pair(2)
    moved = output * 1
    value = kinetic_energy(moved, features)
    moved += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_keeps_nothing_but_references(dtype):
    output, features = (torch.randn(32, 16, 8, 8, dtype=dtype).requires_grad_() for _ in range(2))
    in_float32 = output.numel() * 4
    changes, value = allocated_changes(lambda: kinetic_energy(output, features))
    assert sum(changes) < 0.001 * in_float32
    assert max(np.cumsum(changes)) < 0.51 * in_float32  # quarters of the float32 copies, one at a time
    # No copy of either: the two gradients are all there is in backward, too.
    size = output.numel() * output.element_size()
    changes, _ = allocated_changes(value.backward)
    assert max(np.cumsum(changes)) < 2.001 * size
