"""Processes that train the same modules, each on its part of every batch."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from localprop.parallel.averaging import average
from localprop.parallel.job import Job


class Replicas:
    """The replicas of one stage; they stay equal, for they average the gradients of every module.

    After each module's backward, that is: there is no graph that would hold several modules' gradients.

    Args:
        job: the processes.
        ranks: those of this stage, by replica.
    """

    def __init__(self, job: Job, ranks: list[int]) -> None:
        self._job, self._count = job, len(ranks)
        self.index = ranks.index(job.rank) if job.rank in ranks else 0
        # Of every stage, and in the same order in all processes: torch.distributed asks for that.
        group = dist.new_group(ranks)
        self._group = group if isinstance(group, dist.ProcessGroup) else None

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by the mean over the replicas, in place."""
        with self._job.talking("a replica"):
            average(tensors, self._count, self._start)

    def _start(self, flat: Tensor) -> Callable[[], Any]:
        work = dist.all_reduce(flat, group=self._group, async_op=True)
        assert work is not None  # this process is one of the group
        return work.wait

    def highest(self, number: int) -> int:
        """The largest of the replicas' numbers."""
        tensor = torch.tensor(number)
        with self._job.talking("a replica"):
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)
        return int(tensor)

    def part(self, batch: list[Tensor]) -> list[Tensor]:
        """The part of inputs and targets that is this replica's, taken out of their list."""
        own = [tensor.chunk(self._count)[self.index].clone() for tensor in batch]
        batch.clear()
        return own
