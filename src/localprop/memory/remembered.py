"""What operations give on fake tensors, remembered: the same operation on tensors that look the same runs once.

PyTorch remembers that, too, but takes longer to tell whether tensors look the same than many an operation takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

_PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}
_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view}


class Call(NamedTuple):
    """An operation with its arguments.

    Attributes:
        key: all that its result depends on.
        inputs: the tensors among the arguments, in order.
    """

    key: tuple[Any, ...]
    inputs: list[Tensor]


@dataclass(frozen=True, slots=True)
class _Output:
    """A tensor of a result.

    Attributes:
        same: number of the input that it is; None if it is none.
        alias: number of the input whose memory it shares; None if it has memory of its own.
        shape: its sizes.
        stride: its strides.
        offset: where it begins in its memory, in elements.
        dtype: its type.
        device: where it would be.
    """

    same: int | None
    alias: int | None
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device

    def again(self, mode: FakeTensorMode, inputs: list[Tensor]) -> Tensor:
        """Such a tensor, for other inputs that look the same."""
        if self.same is not None:
            return inputs[self.same]
        with torch._C._DisableTorchDispatch():
            tensor = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
            if self.alias is not None:
                tensor.set_(inputs[self.alias].untyped_storage(), self.offset, self.shape, self.stride)
        return FakeTensor(mode, tensor, self.device)


@dataclass(frozen=True, slots=True)
class Remembered:
    """The result of an operation.

    Attributes:
        outputs: its tensors, or None in place of one.
        kind: what holds them: a tuple, a list, or nothing.
    """

    outputs: Sequence[_Output | None]
    kind: type | None

    def again(self, inputs: list[Tensor]) -> Any:
        """Such a result, for other inputs that look the same."""
        mode = inputs[0].fake_mode  # type: ignore[attr-defined]
        tensors = [output and output.again(mode, inputs) for output in self.outputs]
        return self.kind(tensors) if self.kind else tensors[0]


def device_of(tensor: Tensor) -> torch.device | None:
    """Where a fake tensor says that it is; None of any other, and while a kernel runs on it."""
    if type(tensor) is not FakeTensor or tensor.fake_mode.in_kernel_invocation:
        return None
    return tensor.fake_device


def call_of(func: Any, args: Any, kwargs: Any) -> Call | None:
    """Describes an operation with its arguments; None where its result may depend on more than can be described."""
    key: list[Any] = [func, torch.get_default_dtype()]
    inputs: list[Tensor] = []
    if func.namespace != "aten" or not _describe(args, key, inputs):
        return None
    if kwargs and not (_describe(kwargs.keys(), key, inputs) and _describe(kwargs.values(), key, inputs)):
        return None
    if not inputs or len({id(tensor.fake_mode) for tensor in inputs}) > 1:  # type: ignore[attr-defined]
        return None
    return Call(tuple(key), inputs)


def _describe(values: Any, key: list[Any], inputs: list[Tensor]) -> bool:
    """Adds to a key what values look like, and their tensors to `inputs`; whether that is all that matters of them."""
    key.append(len(values))
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            if value.constant is not None or value.fake_mode.shape_env is not None:
                return False
            keys = torch._C._dispatch_keys(value).raw_repr()  # they tell the device, the layout, conjugation
            key += value.shape, value.stride(), value.storage_offset(), value.dtype, keys, value.requires_grad
            inputs.append(value)
        elif kind in _PLAIN:
            key += kind, value  # 1 equals 1.0 and True
        elif kind not in (list, tuple) or not _describe(value, key, inputs):
            return False
    return True


def remember(func: Any, args: Any, kwargs: Any, inputs: list[Tensor]) -> Remembered | None:
    """Finds the result of an operation by running it on tensors that look the same as its inputs.

    Args:
        func: the operation.
        args: its arguments.
        kwargs: likewise.
        inputs: the tensors among them; they are not changed.

    Returns:
        The result; None where it cannot be made again from shapes alone.
    """
    if _TAGS.intersection(func.tags):
        return None
    keys = torch._C._dispatch_keys
    if any(keys(_like(tensor)) != keys(tensor) for tensor in inputs):
        return None
    taken: list[Tensor] = []

    def place(tensor: Tensor) -> Tensor:
        taken.append(_like(tensor))  # one for each argument: that two are the same now says nothing of other calls
        return taken[-1]

    own_args, own_kwargs = tree_map_only(Tensor, place, (args, kwargs))
    try:
        result = func(*own_args, **own_kwargs)
    except Exception:  # which the operation itself will raise
        return None
    kind = type(result) if isinstance(result, (tuple, list)) else None
    tensors = result if kind else [result]
    outputs = [None if tensor is None else _output(tensor, taken) for tensor in tensors]
    if any(output is None and tensor is not None for output, tensor in zip(outputs, tensors, strict=True)):
        return None
    memory = {tensor.untyped_storage()._cdata for tensor in taken}
    own = [tensor.untyped_storage()._cdata for tensor in tensors if tensor is not None]
    own = [address for address in own if address not in memory]
    return Remembered(outputs, kind) if len(set(own)) == len(own) else None


def _like(tensor: Any) -> Tensor:
    """A fake tensor that looks the same and has memory of its own."""
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    with torch._C._DisableTorchDispatch():
        length = tensor.storage_offset() + (span + 1 if tensor.numel() else 0)
        memory = torch.empty(length, dtype=tensor.dtype, device="meta")
        own = memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return FakeTensor(tensor.fake_mode, own, tensor.fake_device).requires_grad_(tensor.requires_grad)


def _output(tensor: Any, inputs: list[Tensor]) -> _Output | None:
    if type(tensor) is not FakeTensor or tensor.constant is not None:
        return None
    same = next((i for i, one in enumerate(inputs) if one is tensor), None)
    address = tensor.untyped_storage()._cdata
    alias = next((i for i, one in enumerate(inputs) if one.untyped_storage()._cdata == address), None)
    offset = int(tensor.storage_offset())
    output = _Output(same, alias, tensor.shape, tensor.stride(), offset, tensor.dtype, tensor.fake_device)
    if same is None:
        again = output.again(tensor.fake_mode, inputs)
        if tensor.requires_grad or _look(again) != _look(tensor):
            return None
    return output


def _look(tensor: Tensor) -> tuple[Any, ...]:
    return torch._C._dispatch_keys(tensor), tensor.storage_offset(), tensor.untyped_storage().nbytes()
