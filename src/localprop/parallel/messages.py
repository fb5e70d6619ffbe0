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
    """Sends batches to another stage, `IN_FLIGHT` at once.

    Args:
        job: the processes.
        rank: the process of the other stage.
        group: whose connections to use; default: those of the batches that go forward.
    """

    def __init__(self, job: Job, rank: int, group: dist.ProcessGroup | None = None) -> None:
        self._job, self._rank, self._group = job, rank, group
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
        self._wait(IN_FLIGHT - 1)

    def settle(self) -> None:
        """Returns when all that was sent is taken."""
        self._wait(0)

    def _wait(self, most: int) -> None:
        with self._job.talking(f"rank {self._rank}"):
            while len(self._pending) > most:
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
                dist.send(torch.tensor([text.numel()]), self._rank, self._group)
                dist.send(text, self._rank, self._group)
            elif form != self._form:
                raise AssertionError("batches of an epoch differ in form")
            self._form, self._alike = form, 1 if announced else self._alike + 1
            # Kept until they are taken: nobody else may hold them.
            self._pending.append(([dist.isend(tensor, self._rank, self._group) for tensor in tensors], tensors))


class Receiver:
    """Receives batches from another stage, some of them ahead of the one that is worked on.

    Args:
        job: as of `Sender`, and so the next two.
        rank: see there.
        group: see there.
        ahead: how many at most.
    """

    def __init__(self, job: Job, rank: int, group: dist.ProcessGroup | None = None, ahead: int = IN_FLIGHT) -> None:
        self._job, self._rank, self._group, self._ahead = job, rank, group, ahead
        self._posted: deque[tuple[list[Any], list[Tensor]]] = deque()

    def in_flight(self) -> list[Tensor]:
        """What comes ahead."""
        return [tensor for _, tensors in self._posted for tensor in tensors]

    @property
    def full(self) -> bool:
        """Whether that is as much as may be."""
        return len(self._posted) == self._ahead

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
            while len(self._posted) < min(left, self._ahead + 1):
                self._posted.append(self._post(form))
            yield self._take(form, self._posted.popleft())

    def _form(self) -> Form:
        length = torch.zeros(1, dtype=torch.int64)
        with self._job.talking(f"rank {self._rank}"):
            dist.recv(length, self._rank, self._group)
        if not 0 < (size := int(length)) <= _LONGEST:
            raise ParallelError(f"rank {self._rank} announces a form of {size} bytes; start all processes again")
        text = torch.empty(size, dtype=torch.uint8)
        with self._job.talking(f"rank {self._rank}"):
            dist.recv(text, self._rank, self._group)
        return Form.of_bytes(text, f"rank {self._rank}")

    def _post(self, form: Form) -> tuple[list[Any], list[Tensor]]:
        buffers = [own.buffer(self._job.device) for own in form.tensors]
        buffers.append(torch.empty(2 + form.numbers * form.width, dtype=torch.float64))
        with self._job.talking(f"rank {self._rank}"):
            return [dist.irecv(buffer, self._rank, self._group) for buffer in buffers], buffers

    def _take(self, form: Form, posted: tuple[list[Any], list[Tensor]]) -> Carry:
        works, buffers = posted
        with self._job.talking(f"rank {self._rank}"):
            for work in works:
                work.wait()
        return unpack(form, buffers)


class WayBack:
    """One hop back: from each stage to the one before it, beside the batches that go forward.

    It is for heads that read ahead, where the stage after has a gradient for what it received.
    It has connections of its own: on those of the batches, which NCCL uses in the order of the calls, each of two
    stages could wait for the other.

    All processes of a job make theirs at the same time.

    Args:
        job: the processes.
        before: the process of the stage before; None for the first stage.
        after: the process of the stage after; None for the last stage.
    """

    def __init__(self, job: Job, before: int | None, after: int | None) -> None:
        group = dist.new_group()
        assert isinstance(group, dist.ProcessGroup)  # of which this process is part
        self._sender = None if before is None else Sender(job, before, group)
        self._receiver = None if after is None else Receiver(job, after, group)

    def send(self, carry: Carry) -> None:
        """Hands a batch to the stage before; it waits while `IN_FLIGHT` of them have not been received."""
        assert self._sender is not None, "the first stage has none before it"
        self._sender.wait_for_room()
        self._sender.send(carry, training=True, announced=True)

    def receive(self) -> Carry:
        """The next batch that the stage after has sent back."""
        assert self._receiver is not None, "the last stage has none after it"
        return self._receiver.one()

    def in_flight(self) -> list[Tensor]:
        """What has been sent back and is not known to be received."""
        return self._sender.in_flight() if self._sender else []

    def settle(self) -> None:
        """Returns when all that was sent back is received."""
        if self._sender:
            self._sender.settle()
