"""Copies of models on fake tensors, which have shapes and no values: no memory, no data."""

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def fake_copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of `model` with fake parameters and buffers on the CPU: no memory, and the original stays untouched.

    Hooks are left out, since they are the user's own code and not to be run on fake tensors.
    """
    memo: dict[int, Any] = {}
    with mode:
        for tensor in [*model.parameters(), *model.buffers()]:
            fake: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = fake
    for module in model.modules():
        memo.update({id(t): t.detach().cpu() for t in vars(module).values() if isinstance(t, Tensor)})
        memo.update({id(getattr(module, hooks)): OrderedDict() for hooks in HOOKS})
    return copy.deepcopy(model, memo)


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in a value, in lists, tuples and dicts too."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in tensors_of(item)] if isinstance(value, (list, tuple)) else []
