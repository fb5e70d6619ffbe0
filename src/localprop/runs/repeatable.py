"""Training that gives the same bits each time: the kernels of torch that a run may use."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from localprop.errors import ConfigError

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
# With these cuBLAS is deterministic on several streams, too. Torch accepts no others.
_CUBLAS_VALUES = (":4096:8", ":16:8")
# What torch says where it has no deterministic kernel for an operation.
_NO_KERNEL = re.compile(r"(\S+) does not have a deterministic implementation")


@contextmanager
def repeatable_kernels(deterministic: bool) -> Iterator[None]:
    """Inside, convolutions on CUDA are repeatable; with `deterministic`, everything is. Enter it before CUDA is used.

    cuDNN then uses only its deterministic algorithms, for transposed convolutions too. The other operations of a local
    step are repeatable by themselves, except for the backward of attention over many tokens: that needs torch's
    deterministic algorithms.

    Args:
        deterministic: whether torch uses only deterministic algorithms.

    Raises:
        ConfigError: with `deterministic`, an operation has no such algorithm, or cuBLAS is set up otherwise.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling: Any = torch.utils.deterministic
    fills, cudnn = filling.fill_uninitialized_memory, torch.backends.cudnn.deterministic
    added = False
    try:
        torch.backends.cudnn.deterministic = True
        if deterministic:
            added = _set_cublas()
            torch.use_deterministic_algorithms(True)
            # Nothing reads memory before it is written to, and to fill it takes time.
            filling.fill_uninitialized_memory = False
        yield
    except RuntimeError as error:
        operation = _NO_KERNEL.search(str(error)) if deterministic else None
        if not operation:
            raise
        raise ConfigError(
            f"--deterministic: torch has no deterministic {operation[1]}; leave --deterministic out, or choose a model "
            "without that operation"
        ) from None
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        filling.fill_uninitialized_memory = fills
        torch.backends.cudnn.deterministic = cudnn
        if added:
            del os.environ[_CUBLAS]


def _set_cublas() -> bool:
    """Makes cuBLAS deterministic, unless it is already; returns whether the environment was changed."""
    value = os.environ.get(_CUBLAS)
    if value is None:
        os.environ[_CUBLAS] = _CUBLAS_VALUES[0]
    elif value not in _CUBLAS_VALUES:
        raise ConfigError(
            f"--deterministic needs {_CUBLAS} to be {' or '.join(_CUBLAS_VALUES)}, and it is {value!r}; unset it"
        )
    return value is None
