"""Fixtures that tests of several rooms use."""

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """Computes in one thread, and puts things back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
