"""Local modules on several ranks."""

from collections.abc import Sequence
from itertools import pairwise

from localprop.planning.schedules.clock import (
    Event,
    Link,
    StageTime,
    Timing,
    message,
    period,
    play,
    require,
    ring,
    timing,
)

_ROUNDS = 64  # batches that are played, in multiples of those that may be in flight


def local_modules(
    stages: Sequence[StageTime],
    link: Link = Link(),  # noqa: B008
    in_flight: int = 2,
    replicas: int = 1,
    micro_batches: int = 1,
) -> Timing:
    """Local modules, some to each rank: features go forward, nothing comes back.

    While a rank computes, the batch before is sent and the next ones are received.

    Args:
        stages: of each rank.
        link: between neighbours.
        in_flight: (micro-)batches that a rank has sent and that are not taken yet, and as many that the next has room
            for beside the one it works on. Who is further ahead waits.
        replicas: ranks that each stage has, with the times of a replica's part of the batch. They reduce the gradients
            of a stage in a ring, behind its backward.
        micro_batches: into which a batch is divided. Gradients are reduced, and the optimizer steps, behind the last.
    """
    require("in_flight", in_flight, 1)
    require("micro_batches", micro_batches, 1)
    count = _ROUNDS * (in_flight + 1) * micro_batches
    tails = [stage.update + ring(stage.gradients, replicas, link) for stage in stages]
    parts = [(stage.seconds - stage.update) / micro_batches for stage in stages]
    compute = [
        [Event(part + tail * ((number + 1) % micro_batches == 0)) for number in range(count)]
        for part, tail in zip(parts, tails, strict=True)
    ]
    links = [[message(stage.output / micro_batches, link) for _ in range(count)] for stage in stages[:-1]]
    turns = [micro_batches * part + tail for part, tail in zip(parts, tails, strict=True)]
    for rank, messages in enumerate(links):
        for batch, own in enumerate(messages):
            own.after.append(compute[rank][batch])
            compute[rank + 1][batch].after.append(own)
            if batch + in_flight + 1 < count:
                # The next has no room before it is done with this one; and before this one is taken, the sender does
                # not go on to compute.
                messages[batch + in_flight + 1].after.append(compute[rank + 1][batch])
                compute[rank][batch + in_flight + 1].after.append(own)
    play([*compute, *links])
    bounds = {}
    for rank, (stage, (mine, other)) in enumerate(zip(stages, pairwise(turns), strict=False)):
        travel = stage.output / link.bandwidth
        # With a far neighbour it is the room for batches in flight that holds both up.
        there = travel + micro_batches * link.latency + max(mine, other)
        bounds[f"link {rank}-{rank + 1}"] = max(travel, there / (in_flight + 1))
    return timing(period(compute[-1][micro_batches - 1 :: micro_batches]), [stage.seconds for stage in stages], bounds)
