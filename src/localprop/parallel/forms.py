"""The form of a batch on the wire: shapes, types and places in memory, and the values beside the tensors, as JSON."""

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


@dataclass(frozen=True)
class Form:
    """What the next stage has to know before it can receive a batch.

    Attributes:
        tensors: of features, labels and the tensors in the context.
        names: of the tensors in the context.
        context: the rest of the context, as `nested.split` gives it.
        numbers: how many losses (or hits) come with it.
        training: whether these are losses.
    """

    tensors: tuple[TensorForm, ...]
    names: tuple[str, ...]
    context: Any
    numbers: int
    training: bool

    def to_bytes(self) -> Tensor:
        """The form as JSON, in a tensor of bytes."""
        tensors = [form.as_json() for form in self.tensors]
        return bytes_of_json([tensors, self.names, self.context, self.numbers, self.training])

    @classmethod
    def of_bytes(cls, received: Tensor, sender: str) -> "Form":
        """The form that `to_bytes` wrote; `sender` is named in an error.

        Raises:
            ParallelError: it is none.
        """
        try:
            tensors, names, context, numbers, training = json_of_bytes(received)
            forms = tuple(map(TensorForm.of_json, tensors))
            if len(forms) != 2 + len(names) or type(numbers) is not int or numbers < 0 or type(training) is not bool:
                raise ValueError("its parts do not fit each other")
            return cls(forms, tuple(names), context, numbers, training)
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
        ParallelError: the context holds something that cannot be sent.
    """
    beside: dict[str, Tensor] = {}
    try:
        context = split(carry.context, "context", beside)
    except Unknown as error:
        raise ParallelError(
            f"the model hands along a {error}, which cannot be sent to another process; that takes tensors, {KINDS}. "
            "Choose other --cuts, or train in one process"
        ) from None
    tensors = [carry.features, carry.labels, *beside.values()]
    forms = tuple(map(TensorForm.of, tensors))
    numbers = [loss.item() for loss in carry.losses] if training else carry.hits
    # Of doubles: a float32 loss and a count of images keep every bit.
    last = torch.tensor([carry.stop, *(math.nan if n is None else n for n in numbers)], dtype=torch.float64)
    flat = [form.bytes_of(tensor) for form, tensor in zip(forms, tensors, strict=True)]
    return Form(forms, tuple(beside), context, len(numbers), training), [*flat, last]


def unpack(form: Form, received: list[Tensor]) -> Carry:
    """The batch, from what was received."""
    *flat, last = received
    tensors = [own.restore(tensor) for own, tensor in zip(form.tensors, flat, strict=True)]
    context = join(form.context, dict(zip(form.names, tensors[2:], strict=True)))
    stop, *numbers = last.tolist()
    carry = Carry(tensors[0], tensors[1], context=context, stop=int(stop))
    if form.training:
        carry.losses = [torch.tensor(n, dtype=torch.float32, device=tensors[0].device) for n in numbers]
    else:
        carry.hits = [None if math.isnan(n) else int(n) for n in numbers]
    return carry
