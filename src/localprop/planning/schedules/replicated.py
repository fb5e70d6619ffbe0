"""Data parallelism: the whole network on every rank."""

from collections.abc import Sequence

from localprop.planning.schedules.clock import (
    BATCHES,
    Event,
    Link,
    StageTime,
    Timing,
    period,
    play,
    require,
    ring,
    share,
)


def data_parallel(
    stages: Sequence[StageTime],
    ranks: int,
    link: Link = Link(),  # noqa: B008
    overlapped: bool = True,
) -> Timing:
    """Data parallelism with a ring all-reduce of the gradients, each rank having all stages and a part of the batch.

    Args:
        stages: of the whole network, with the times of a rank's part of the batch; the gradients of each are one
            bucket.
        ranks: number of ranks.
        link: between neighbours in the ring.
        overlapped: whether a bucket is reduced while backward runs; otherwise all at once after it.
    """
    require("ranks", ranks, 1)
    compute: list[Event] = []
    reduced: list[Event] = []
    updates = []
    for _ in range(BATCHES):
        compute.append(Event(sum(stage.forward for stage in stages)))
        buckets = []
        for stage in reversed(stages):
            compute.append(Event(stage.backward + stage.weights))
            buckets.append(Event(ring(stage.gradients, ranks, link), [compute[-1]]))
        if not overlapped:
            buckets = [Event(ring(sum(stage.gradients for stage in stages), ranks, link), [compute[-1]])]
        reduced += buckets
        compute.append(Event(sum(stage.update for stage in stages), list(buckets)))
        updates.append(compute[-1])
    play([compute, reduced])
    seconds, busy = period(updates), sum(stage.seconds for stage in stages)
    carried = sum(event.seconds for event in reduced) / BATCHES
    return Timing(seconds, (share(busy, seconds),) * ranks, "every link" if carried > busy else "every rank")
