"""A batch on its way from one stage to the next: its form, told once, and then bytes, several batches in flight."""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from localprop.carry import Carry
from localprop.layout import IN_FLIGHT
from localprop.parallel.job import Job

_ALIGNED = 64  # bytes; CPU kernels look at addresses up to here


@dataclass(frozen=True)
class TensorForm:
    """How a tensor lies in memory. Kernels go by strides and alignment, and may round otherwise for others."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    shift: int = field(compare=False)  # elements behind an aligned address

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorForm":
        """The form of a tensor."""
        shift = tensor.data_ptr() % _ALIGNED // tensor.element_size()
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, shift)

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
        """What is sent: all elements, one behind the other, without a copy where that is how they lie."""
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
        context: the context's values, with None in place of tensors.
        places: which of these the tensors belong to.
        spec: how the values make the context.
        numbers: how many losses (or hits) come with it.
        training: whether these are losses.
    """

    tensors: tuple[TensorForm, ...]
    context: tuple[Any, ...]
    places: tuple[int, ...]
    spec: pytree.TreeSpec
    numbers: int
    training: bool


def pack(carry: Carry, training: bool) -> tuple[Form, list[Tensor]]:
    """The form of a batch, and the flat tensors to send: the numbers come last, on the CPU."""
    leaves, spec = pytree.tree_flatten(carry.context)
    places = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    tensors = [carry.features, carry.labels, *(leaves[i] for i in places)]
    forms = tuple(map(TensorForm.of, tensors))
    values = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    numbers = [loss.item() for loss in carry.losses] if training else carry.hits
    # Of doubles: a float32 loss and a count of images keep every bit.
    last = torch.tensor([carry.stop, *(math.nan if n is None else n for n in numbers)], dtype=torch.float64)
    flat = [form.bytes_of(tensor) for form, tensor in zip(forms, tensors, strict=True)]
    return Form(forms, values, places, spec, len(numbers), training), [*flat, last]


def unpack(form: Form, received: list[Tensor]) -> Carry:
    """The batch, from what was received."""
    *flat, last = received
    tensors = [own.restore(tensor) for own, tensor in zip(form.tensors, flat, strict=True)]
    leaves = list(form.context)
    for place, tensor in zip(form.places, tensors[2:], strict=True):
        leaves[place] = tensor
    stop, *numbers = last.tolist()
    carry = Carry(tensors[0], tensors[1], context=pytree.tree_unflatten(leaves, form.spec), stop=int(stop))
    if form.training:
        carry.losses = [torch.tensor(n, dtype=torch.float32, device=tensors[0].device) for n in numbers]
    else:
        carry.hits = [None if math.isnan(n) else int(n) for n in numbers]
    return carry


class Sender:
    """Sends batches to the next stage, `IN_FLIGHT` at once."""

    def __init__(self, job: Job, rank: int) -> None:
        self._job, self._rank = job, rank
        self._form: Form | None = None
        self._alike = 0  # batches of this form
        self._pending: deque[tuple[list[Any], list[Tensor]]] = deque()

    def in_flight(self) -> list[Tensor]:
        """What has been sent and is not known to be taken."""
        return [tensor for _, tensors in self._pending for tensor in tensors]

    @property
    def full(self) -> bool:
        """Whether that is as much as may be, all of the present form."""
        return self._alike >= IN_FLIGHT

    def wait_for_room(self) -> None:
        """Returns when one more may be sent."""
        with self._job.talking(f"rank {self._rank}"):
            while len(self._pending) >= IN_FLIGHT:
                works, _ = self._pending.popleft()
                for work in works:
                    work.wait()

    def send(self, carry: Carry, training: bool, announced: bool) -> None:
        """Sends a batch, for which there is room; `announced` with its form, without which it has
        to have that of the one before.
        """
        form, tensors = pack(carry, training)
        with self._job.talking(f"rank {self._rank}"):
            if announced:
                dist.send_object_list([form], self._rank, device=torch.device("cpu"))
            elif form != self._form:
                raise AssertionError("batches of an epoch differ in form")
            self._form, self._alike = form, 1 if announced else self._alike + 1
            # Kept until they are taken: nobody else may hold them.
            self._pending.append(([dist.isend(tensor, self._rank) for tensor in tensors], tensors))


class Receiver:
    """Receives batches from the stage before, `IN_FLIGHT` ahead of the one that is worked on."""

    def __init__(self, job: Job, rank: int) -> None:
        self._job, self._rank = job, rank
        self._posted: deque[tuple[list[Any], list[Tensor]]] = deque()

    def in_flight(self) -> list[Tensor]:
        """What comes ahead."""
        return [tensor for _, tensors in self._posted for tensor in tensors]

    @property
    def full(self) -> bool:
        """Whether that is as much as may be."""
        return len(self._posted) == IN_FLIGHT

    def one(self) -> Carry:
        """The next batch, which comes with its form."""
        form = self._form()
        return self._take(form, self._post(form))

    def stream(self, count: int) -> Iterator[Carry]:
        """The next `count` batches, of the same form, which comes with the first."""
        if not count:
            return
        form = self._form()
        for left in range(count, 0, -1):
            while len(self._posted) < min(left, IN_FLIGHT + 1):
                self._posted.append(self._post(form))
            yield self._take(form, self._posted.popleft())

    def _form(self) -> Form:
        received: list[Any] = [None]
        with self._job.talking(f"rank {self._rank}"):
            dist.recv_object_list(received, self._rank, device=torch.device("cpu"))
        return received[0]

    def _post(self, form: Form) -> tuple[list[Any], list[Tensor]]:
        buffers = [own.buffer(self._job.device) for own in form.tensors]
        buffers.append(torch.empty(1 + form.numbers, dtype=torch.float64))
        with self._job.talking(f"rank {self._rank}"):
            return [dist.irecv(buffer, self._rank) for buffer in buffers], buffers

    def _take(self, form: Form, posted: tuple[list[Any], list[Tensor]]) -> Carry:
        works, buffers = posted
        with self._job.talking(f"rank {self._rank}"):
            for work in works:
                work.wait()
        return unpack(form, buffers)
