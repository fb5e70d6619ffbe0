"""Averages gradients over processes, in buckets: on real tensors, and in a prediction of memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

BUCKET = 25 << 20
"""Bytes that are put together to travel at once."""


def average(tensors: Iterable[Tensor], count: int, start: Callable[[Tensor], Callable[[], Any]]) -> None:
    """Replaces tensors by their mean over `count` processes, in place.

    While a bucket travels the next is put together, so that two are there beside the tensors; a tensor as large as a
    bucket travels as it is.

    Args:
        tensors: in the same order in every process.
        count: the number of processes.
        start: given a flat tensor, begins to replace it by its sum over the processes; gives what waits for that.
    """
    under_way: deque[tuple[Callable[[], Any], Tensor, list[Tensor]]] = deque()
    for bucket in _buckets(tensors):
        if len(under_way) == 2:
            _finish(*under_way.popleft(), count)
        if len(bucket) == 1 and bucket[0].is_contiguous():
            flat = bucket.pop().view(-1)
        else:
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        under_way.append((start(flat), flat, bucket))
    while under_way:
        _finish(*under_way.popleft(), count)


def _finish(wait: Callable[[], Any], flat: Tensor, bucket: list[Tensor], count: int) -> None:
    wait()
    flat.div_(count)
    if bucket:
        for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type, as many as go into `BUCKET`, at least one."""
    for _, alike in groupby(sorted(tensors, key=lambda tensor: str(tensor.dtype)), key=lambda tensor: tensor.dtype):
        bucket: list[Tensor] = []
        for tensor in alike:
            if bucket and sum(own.nbytes for own in bucket) + tensor.nbytes > BUCKET:
                yield bucket
                bucket = []
            bucket.append(tensor)
        yield bucket
