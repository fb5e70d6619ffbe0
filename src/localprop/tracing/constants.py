"""Small tensors that a model makes of Python numbers keep their values where all others are fake.

`torchvision.transforms.Normalize` asks whether a standard deviation is zero: that depends on its settings alone, not on
pixels, and can be answered.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

_MAKERS = (torch.tensor, torch.as_tensor)
_MOST = 1000
"""Elements of a result that is kept; larger ones are fake, as the rest, so that their memory is accounted for."""


class KeepConstants(TorchFunctionMode):
    """Inside, what is computed from such tensors alone is computed for real, under any mode of fake tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs a function."""
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = func in _MAKERS and not tensors and len(tree_leaves(args)) <= _MOST
        if not made and not (tensors and all(hasattr(tensor, "_constant") for tensor in tensors)):
            return func(*args, **kwargs)
        with _disable_current_modes():
            result = func(*args, **kwargs)
        made_of = [leaf for leaf in tree_leaves(result) if type(leaf) is Tensor]
        if any(tensor.numel() > _MOST for tensor in made_of):
            return func(*args, **kwargs)
        for tensor in made_of:
            tensor._constant = True  # type: ignore[attr-defined]
        return result
