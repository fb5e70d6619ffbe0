"""Processes that train the same modules, each on its part of every batch."""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from localprop.parallel.job import Job

_BUCKET = 25 << 20
"""Bytes that travel at once: while some do, the next are put together. So much is taken twice, beside gradients."""


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
        under_way: deque[tuple[dist.Work | None, Tensor, list[Tensor]]] = deque()
        with self._job.talking("a replica"):
            for bucket in _buckets(tensors):
                if len(under_way) == 2:
                    self._finish(*under_way.popleft())
                flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
                under_way.append((dist.all_reduce(flat, group=self._group, async_op=True), flat, bucket))
            while under_way:
                self._finish(*under_way.popleft())

    def _finish(self, work: dist.Work | None, flat: Tensor, bucket: list[Tensor]) -> None:
        assert work is not None  # this process is one of the group
        work.wait()
        parts = flat.div_(self._count).split([tensor.numel() for tensor in bucket])
        for tensor, part in zip(bucket, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def highest(self, number: int) -> int:
        """The largest of the replicas' numbers."""
        tensor = torch.tensor(number)
        with self._job.talking("a replica"):
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)
        return int(tensor)

    def part(self, batch: list[Tensor]) -> list[Tensor]:
        """The part of images and labels that is this replica's, taken out of their list."""
        own = [tensor.chunk(self._count)[self.index].clone() for tensor in batch]
        batch.clear()
        return own


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    for _, alike in groupby(sorted(tensors, key=lambda t: str(t.dtype)), key=lambda t: t.dtype):
        bucket: list[Tensor] = []
        for tensor in alike:
            bucket.append(tensor)
            if sum(own.nbytes for own in bucket) >= _BUCKET:
                yield bucket
                bucket = []
        if bucket:
            yield bucket
