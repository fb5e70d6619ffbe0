"""Local modules on several ranks."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

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
    """Local modules, some to each rank: features go forward, and nothing comes back, or one gradient.

    While a rank computes, the batch before is sent and the next ones are received. Where a head reads ahead into the
    next rank (`StageTime.ahead`), its rank sends in the middle of its turn, and waits there for the gradient.

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
    shared = [stage.ahead > 0 for stage in stages[1:]] + [False]
    tails = [stage.update + ring(stage.gradients, replicas, link) for stage in stages]
    turns = [
        [_turn(stage, waits, tail * ((number + 1) % micro_batches == 0), micro_batches) for number in range(count)]
        for stage, waits, tail in zip(stages, shared, tails, strict=True)
    ]
    links = [[message(stage.output / micro_batches, link) for _ in range(count)] for stage in stages[:-1]]
    back = [[message(own.output / micro_batches, link) for _ in range(count)] for own in stages[:-1]]
    for rank, messages in enumerate(links):
        for batch, own in enumerate(messages):
            own.after.append(turns[rank][batch].sends)
            turns[rank + 1][batch].begins.after.append(own)
            if shared[rank]:
                back[rank][batch].after.append(turns[rank + 1][batch].begins)
                turns[rank][batch].ends.after.append(back[rank][batch])
            if batch + in_flight + 1 < count:
                # The next has no room before it is done with this one; and before this one is taken, the sender does
                # not go on to compute.
                messages[batch + in_flight + 1].after.append(turns[rank + 1][batch].ends)
                turns[rank][batch + in_flight + 1].begins.after.append(own)
    compute = [[event for turn in own for event in dict.fromkeys(turn)] for own in turns]
    play([*compute, *links, *(messages for messages, own in zip(back, shared, strict=False) if own)])
    bounds = {}
    longest = [stage.seconds - stage.update + tail for stage, tail in zip(stages, tails, strict=True)]
    for rank, (stage, (mine, other)) in enumerate(zip(stages, pairwise(longest), strict=False)):
        travel = stage.output / link.bandwidth
        # With a far neighbour it is the room for batches in flight that holds both up.
        there = travel + micro_batches * link.latency + max(mine, other)
        bound = max(travel, there / (in_flight + 1))
        if shared[rank]:  # nothing is in flight while the rank waits
            bound = max(bound, 2 * (travel + micro_batches * link.latency))
        bounds[f"link {rank}-{rank + 1}"] = bound
    done = [turn.ends for turn in turns[-1]]
    return timing(period(done[micro_batches - 1 :: micro_batches]), [stage.seconds for stage in stages], bounds)


class _Turn(NamedTuple):
    """A rank's events of a (micro-)batch, in order; where nothing comes between two of them, they are one."""

    begins: Event
    sends: Event
    ends: Event


def _turn(stage: StageTime, waits: bool, tail: float, micro_batches: int) -> _Turn:
    """A turn of which the last part waits, where `waits`, for what comes back; behind it, `tail` seconds."""
    behind = (stage.backward + stage.weights) / micro_batches
    sends = Event(stage.forward / micro_batches + (0.0 if waits else behind + tail))
    begins = Event(stage.ahead / micro_batches) if stage.ahead else sends
    return _Turn(begins, sends, Event(behind + tail) if waits else sends)
