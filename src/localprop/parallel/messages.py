"""Batches on their way from one stage to the next: a form, sent once, and then bytes, several batches in flight."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from localprop.errors import ParallelError
from localprop.network.carry import Carry
from localprop.parallel.forms import Form, pack, unpack
from localprop.parallel.job import Job
from localprop.parallel.placement import IN_FLIGHT

_LONGEST = 1 << 24  # bytes of a form


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
                text = form.to_bytes()
                dist.send(torch.tensor([text.numel()]), self._rank)
                dist.send(text, self._rank)
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
        length = torch.zeros(1, dtype=torch.int64)
        with self._job.talking(f"rank {self._rank}"):
            dist.recv(length, self._rank)
        if not 0 < (size := int(length)) <= _LONGEST:
            raise ParallelError(f"rank {self._rank} announces a form of {size} bytes; start all processes again")
        text = torch.empty(size, dtype=torch.uint8)
        with self._job.talking(f"rank {self._rank}"):
            dist.recv(text, self._rank)
        return Form.of_bytes(text, f"rank {self._rank}")

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
