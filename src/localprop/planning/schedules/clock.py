"""Times and links, and events that keep ranks and links busy and wait for each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from localprop.errors import ConfigError

BATCHES = 12
"""Of a run that is empty between two batches: every batch is soon like the one before."""


@dataclass(frozen=True)
class StageTime:
    """What a rank computes and sends for one batch, all its micro-batches together.

    Attributes:
        forward: seconds of the forward pass, or of all that there is if nothing else is given.
        backward: seconds of backward, without what `weights` has.
        weights: seconds of the part of backward that only gradients of weights need, which zero-bubble puts off.
        update: seconds of the optimizer's step.
        output: bytes that go to the next stage, and as many come back where gradients do.
        gradients: bytes of the weights' gradients.
        ahead: seconds, before `forward`, of what the rank before waits for: its head reads ahead, through the first
            units here. That rank then sends after its `forward`, and waits before its `backward`.
    """

    forward: float
    backward: float = 0.0
    weights: float = 0.0
    update: float = 0.0
    output: float = 0.0
    gradients: float = 0.0
    ahead: float = 0.0

    @property
    def seconds(self) -> float:
        """All that is computed."""
        return self.ahead + self.forward + self.backward + self.weights + self.update


@dataclass(frozen=True)
class Link:
    """A connection of two neighbours, as fast in both directions at once.

    Attributes:
        bandwidth: bytes per second.
        latency: seconds until the first byte is there; the next message may be on its way by then.
    """

    bandwidth: float = inf
    latency: float = 0.0


@dataclass(frozen=True)
class Timing:
    """How a batch goes in the steady state.

    Attributes:
        seconds: from one batch to the next.
        waiting: of each rank, the share of that time in which it computes nothing.
        bottleneck: what is busiest: "rank 1", or "link 1-2".
    """

    seconds: float
    waiting: tuple[float, ...]
    bottleneck: str


@dataclass(eq=False)
class Event:
    """Something that keeps a rank, or a link, busy.

    Attributes:
        seconds: how long.
        after: what must have ended before it starts.
        delay: seconds from its end until others notice.
        ended: when others notice; None before it has been played.
    """

    seconds: float
    after: list["Event"] = field(default_factory=list)
    delay: float = 0.0
    ended: float | None = None


def message(size: float, link: Link) -> Event:
    """A message of so many bytes on its way."""
    return Event(size / link.bandwidth, delay=link.latency)


def ring(size: float, ranks: int, link: Link) -> float:
    """Seconds of a ring all-reduce of so many bytes: 2 (n - 1) rounds, an n-th of the bytes in each."""
    return 2 * (ranks - 1) * (size / ranks / link.bandwidth + link.latency)


def play(queues: list[list[Event]]) -> None:
    """Plays out events, those of a queue one after the other."""
    heads, free = [0] * len(queues), [0.0] * len(queues)
    moved = True
    while moved:
        moved = False
        for q, queue in enumerate(queues):
            while heads[q] < len(queue):
                event = queue[heads[q]]
                times = [before.ended for before in event.after]
                if None in times:
                    break
                free[q] = max(free[q], *(t for t in times if t is not None), 0.0) + event.seconds
                event.ended = free[q] + event.delay
                heads[q] += 1
                moved = True
    assert all(head == len(queue) for head, queue in zip(heads, queues, strict=True)), "a schedule waits for itself"


def period(ends: Sequence[Event]) -> float:
    """Seconds from one batch to the next, from the events that end them; over the second half."""
    half = len(ends) // 2
    first, last = ends[half - 1].ended, ends[-1].ended
    assert first is not None
    assert last is not None
    return (last - first) / (len(ends) - half)


def timing(seconds: float, busy: Sequence[float], links: Mapping[str, float]) -> Timing:
    """What to tell of a schedule.

    Args:
        seconds: from one batch to the next.
        busy: seconds that each rank computes in a batch.
        links: seconds below which each link does not let a batch be.
    """
    loads = {f"rank {rank}": own for rank, own in enumerate(busy)} | dict(links)
    return Timing(seconds, tuple(share(own, seconds) for own in busy), max(loads, key=loads.__getitem__))


def share(busy: float, seconds: float) -> float:
    """The share of a time in which nothing is computed."""
    return max(0.0, 1 - busy / seconds) if seconds else 0.0


def require(name: str, value: int, least: int) -> None:
    """Raises a ConfigError where a setting is too small."""
    if value < least:
        raise ConfigError(f"{name} is {value}; it must be at least {least}")
