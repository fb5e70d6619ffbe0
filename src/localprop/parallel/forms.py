"""The form of a batch on the wire: shapes, types and places in memory, and the values beside the tensors, as JSON."""

import itertools
import json
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from localprop.errors import CheckpointError, ParallelError
from localprop.network.carry import Carry
from localprop.system.nested import KINDS, Unknown, dtype_named, join, split

_ALIGNED = 64  # bytes; CPU kernels look at addresses up to here


@dataclass(frozen=True)
class TensorForm:
    """How a tensor lies in memory. Kernels go by strides and alignment, and may round otherwise for others."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    shift: int = field(compare=False)  # elements after an aligned address

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorForm":
        """The form of a tensor."""
        shift = tensor.data_ptr() % _ALIGNED // tensor.element_size()
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, shift)

    @classmethod
    def of_json(cls, fields: Any) -> "TensorForm":
        """The form that `as_json` wrote.

        Raises:
            ValueError, TypeError, CheckpointError: it is none.
        """
        shape, stride, dtype, shift = fields
        if len(shape) != len(stride):
            raise ValueError("shape and strides differ in length")
        for number in (*shape, *stride, shift):
            if type(number) is not int or number < 0:
                raise ValueError(f"{number!r} is no size")
        if shift >= _ALIGNED:
            raise ValueError(f"{shift} is no shift")
        return cls(tuple(shape), tuple(stride), dtype_named(dtype), shift)

    def as_json(self) -> list[Any]:
        """The form as JSON."""
        return [self.shape, self.stride, str(self.dtype).removeprefix("torch."), self.shift]

    @property
    def _gaps(self) -> bool | None:
        """Whether there are gaps between elements; None where some overlap."""
        reach, gaps = 1, False
        for stride, size in sorted(zip(self.stride, self.shape, strict=True)):
            if size > 1:
                if stride < reach:
                    return None
                gaps |= stride > reach
                reach = stride * size
        return gaps

    def bytes_of(self, tensor: Tensor) -> Tensor:
        """What is sent: all elements, one after the other; without a copy where memory has them so."""
        if self._gaps is False:
            return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
        return tensor.contiguous().view(-1)

    def buffer(self, device: torch.device) -> Tensor:
        """Where to receive."""
        return torch.empty(math.prod(self.shape) + self.shift, dtype=self.dtype, device=device)[self.shift :]

    def restore(self, received: Tensor) -> Tensor:
        """The tensor, from what was received."""
        if self._gaps is False:
            return received.as_strided(self.shape, self.stride, self.shift)
        if self._gaps is None:
            return received.view(self.shape)
        reach = 1 + sum(stride * (size - 1) for stride, size in zip(self.stride, self.shape, strict=True))
        space = torch.empty(reach + self.shift, dtype=self.dtype, device=received.device)
        return space.as_strided(self.shape, self.stride, self.shift).copy_(received.view(self.shape))


_MOST = 10**6  # numbers of a kind: more come from something else


@dataclass(frozen=True)
class Form:
    """What the next stage has to know before it can receive a batch.

    Attributes:
        tensors: of features, targets and the tensors in the context.
        names: of the tensors in the context.
        context: the rest of the context, as `nested.split` gives it.
        numbers: how many losses (or the task's sums of how many modules) come with it.
        width: how many numbers each of them is.
        training: whether these are losses.
    """

    tensors: tuple[TensorForm, ...]
    names: tuple[str, ...]
    context: Any
    numbers: int
    width: int
    training: bool

    def to_bytes(self) -> Tensor:
        """The form as JSON, in a tensor of bytes."""
        tensors = [form.as_json() for form in self.tensors]
        return bytes_of_json([tensors, self.names, self.context, self.numbers, self.width, self.training])

    @classmethod
    def of_bytes(cls, received: Tensor, sender: str) -> "Form":
        """The form that `to_bytes` wrote; `sender` is named in an error.

        Raises:
            ParallelError: it is none.
        """
        try:
            tensors, names, context, numbers, width, training = json_of_bytes(received)
            forms = tuple(map(TensorForm.of_json, tensors))
            counts = all(type(count) is int and 0 <= count <= _MOST for count in (numbers, width))
            if len(forms) != 2 + len(names) or not counts or type(training) is not bool:
                raise ValueError("its parts do not fit each other")
            return cls(forms, tuple(names), context, numbers, width, training)
        except (ValueError, TypeError, RecursionError, CheckpointError) as error:
            raise ParallelError(
                f"{sender} sent something that is not the form of a batch ({error}); start all processes again, with "
                "one version of localprop"
            ) from None


def bytes_of_json(value: Any) -> Tensor:
    """A value that JSON has, in a tensor of bytes."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def json_of_bytes(received: Tensor) -> Any:
    """The value that `bytes_of_json` wrote; tuples are lists now."""
    return json.loads(received.numpy().tobytes())


def pack(carry: Carry, training: bool) -> tuple[Form, list[Tensor]]:
    """The form of a batch, and the flat tensors to send: the numbers come last, on the CPU.

    Raises:
        ParallelError: the batch holds something that cannot be sent.
    """
    if carry.ahead is not None:
        raise ParallelError("a value with a graph cannot be sent to another process; train in one process")
    beside: dict[str, Tensor] = {}
    try:
        context = split(carry.context, "context", beside)
    except Unknown as error:
        raise ParallelError(
            f"the model hands along a {error}, which cannot be sent to another process; that takes tensors, {KINDS}. "
            "Choose other --cuts, or train in one process"
        ) from None
    tensors = [carry.features, carry.targets, *beside.values()]
    forms = tuple(map(TensorForm.of, tensors))
    rows = [[loss.item()] for loss in carry.losses] if training else _rows(carry.sums)
    share = 1.0 if carry.share is None else carry.share.item()
    # Of doubles: a float32 loss and a count of examples keep every bit.
    last = torch.tensor([carry.stop, share, *itertools.chain(*rows)], dtype=torch.float64)
    flat = [form.bytes_of(tensor) for form, tensor in zip(forms, tensors, strict=True)]
    width = len(rows[0]) if rows else 0
    return Form(forms, tuple(beside), context, len(rows), width, training), [*flat, last]


def unpack(form: Form, received: list[Tensor]) -> Carry:
    """The batch, from what was received."""
    *flat, last = received
    tensors = [own.restore(tensor) for own, tensor in zip(form.tensors, flat, strict=True)]
    context = join(form.context, dict(zip(form.names, tensors[2:], strict=True)))
    device = tensors[0].device
    stop, share = last[:2].tolist()
    carry = Carry(tensors[0], tensors[1], context=context, stop=int(stop))
    if share != 1:
        carry.share = torch.tensor(share, dtype=torch.float32, device=device)
    rows = last[2:].view(form.numbers, form.width)
    if form.training:
        carry.losses = [row[0].to(device, torch.float32) for row in rows]
    else:
        carry.sums = [row[1:].to(device) if row[0] else None for row in rows]
    return carry


def _rows(sums: list[Tensor | None]) -> list[list[float]]:
    """A row for each module: whether it has sums, and these."""
    width = max((len(own) for own in sums if own is not None), default=0)
    return [[0.0] * (1 + width) if own is None else [1.0, *own.tolist()] for own in sums]
