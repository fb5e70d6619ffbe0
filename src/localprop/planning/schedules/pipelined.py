"""Pipelines with backward across ranks: 1F1B and zero-bubble."""

from collections.abc import Sequence

from localprop.planning.schedules.clock import (
    BATCHES,
    Event,
    Link,
    StageTime,
    Timing,
    message,
    period,
    play,
    require,
    timing,
)


def one_f_one_b(
    stages: Sequence[StageTime],
    link: Link = Link(),  # noqa: B008
    micro_batches: int = 4,
    overlapped: bool = False,
) -> Timing:
    """1F1B with a flush (PipeDream-flush, Narayanan et al., 2021): a forward and a backward of micro-batches in turn.

    Args:
        stages: of each rank.
        link: between neighbours.
        micro_batches: of a batch; at least as many as stages.
        overlapped: whether messages travel while a rank computes. Otherwise a rank posts them where `Schedule1F1B` of
            torch.distributed.pipelining does, and waits for them there.

    Raises:
        ConfigError: there are fewer micro-batches than stages.
    """
    orders = [one_f_one_b_order(rank, len(stages), micro_batches) for rank in range(len(stages))]
    return _pipeline(stages, link, micro_batches, orders, overlapped)


def zero_bubble(
    stages: Sequence[StageTime],
    link: Link = Link(),  # noqa: B008
    micro_batches: int = 4,
) -> Timing:
    """ZB-H1 (Qi et al., ICLR 2024, arXiv 2401.10241): 1F1B in which gradients of weights fill what would be a bubble.

    It keeps as many activations as 1F1B. Messages travel while a rank computes.

    Args:
        stages: of each rank.
        link: between neighbours.
        micro_batches: of a batch; at least as many as stages.

    Raises:
        ConfigError: there are fewer micro-batches than stages.
    """
    orders = []
    for rank in range(len(stages)):
        order: list[tuple[str, int]] = []
        for kind, i in one_f_one_b_order(rank, len(stages), micro_batches):
            order.append((kind, i))
            # A later stage puts off more of them: it has fewer micro-batches whose activations it keeps.
            if kind == "B" and i >= rank:
                order.append(("W", i - rank))
        orders.append(order + [("W", i) for i in range(micro_batches - rank, micro_batches)])
    return _pipeline(stages, link, micro_batches, orders, overlapped=True)


def one_f_one_b_order(rank: int, ranks: int, micro_batches: int) -> list[tuple[str, int]]:
    """What a rank computes under 1F1B, in order: ("F", micro-batch) or ("B", micro-batch).

    Raises:
        ConfigError: there are fewer micro-batches than ranks.
    """
    require("micro_batches", micro_batches, ranks)
    ahead = ranks - rank
    order = [("F", i) for i in range(ahead)]
    for i in range(micro_batches):
        order.append(("B", i))
        if ahead + i < micro_batches:
            order.append(("F", ahead + i))
    return order


class _Wires:
    """The messages of a pipeline: one for each boundary, direction, batch and micro-batch."""

    def __init__(self, sizes: Sequence[float], link: Link) -> None:
        self.sizes, self.link = sizes, link
        self.lanes: dict[tuple[int, int], list[Event]] = {}
        self._known: dict[tuple[int, int, int, int], Event] = {}

    def message(self, source: int, target: int, batch: int, micro: int) -> list[Event]:
        """The message between two neighbours; none where one of them does not exist."""
        if min(source, target) < 0 or max(source, target) > len(self.sizes):
            return []
        key = (source, target, batch, micro)
        if key not in self._known:
            event = self._known[key] = message(self.sizes[min(source, target)], self.link)
            self.lanes.setdefault((source, target), []).append(event)
        return [self._known[key]]


def _pipeline(
    stages: Sequence[StageTime],
    link: Link,
    micro_batches: int,
    orders: list[list[tuple[str, int]]],
    overlapped: bool,
) -> Timing:
    wires = _Wires([stage.output / micro_batches for stage in stages[:-1]], link)
    queues: list[list[Event]] = []
    for rank, (stage, order) in enumerate(zip(stages, orders, strict=True)):
        # Where there is no part to put off, backward is all of it.
        whole = stage.backward if any(kind == "W" for kind, _ in order) else stage.backward + stage.weights
        seconds = {"F": stage.forward, "B": whole, "W": stage.weights}
        queue: list[Event] = []
        for batch in range(BATCHES):
            work = [(kind, i, Event(seconds[kind] / micro_batches)) for kind, i in order]
            (_free if overlapped else _in_step)(rank, batch, work, queue, wires)
            queue.append(Event(stage.update))
        queues.append(queue)
    per_batch = len(queues[0]) // BATCHES
    play([*queues, *wires.lanes.values()])
    links = {f"link {rank}-{rank + 1}": stage.output / link.bandwidth for rank, stage in enumerate(stages[:-1])}
    return timing(period(queues[0][per_batch - 1 :: per_batch]), [stage.seconds for stage in stages], links)


def _free(rank: int, batch: int, work: list[tuple[str, int, Event]], queue: list[Event], wires: _Wires) -> None:
    """Queues a batch's work; each message leaves when it is there, and is received when it comes."""
    for kind, i, event in work:
        step = {"F": 1, "B": -1, "W": 0}[kind]
        if step:
            event.after += wires.message(rank - step, rank, batch, i)
            for sent in wires.message(rank, rank + step, batch, i):
                sent.after.append(event)
        queue.append(event)


def _in_step(rank: int, batch: int, work: list[tuple[str, int, Event]], queue: list[Event], wires: _Wires) -> None:
    """Queues a batch's work with the messages where torch's `Schedule1F1B` posts them, and waits for them.

    A message travels once both sides have posted it.
    """

    def post(messages: list[Event]) -> list[Event]:
        for own in messages:
            own.after += queue[-1:]
        return messages

    def wait(messages: list[Event]) -> None:
        queue.append(Event(0.0, list(messages)))

    first = next(n for n, (kind, _, _) in enumerate(work) if kind == "B")  # of the work, after the warm-up
    last = max(n for n, (kind, _, _) in enumerate(work) if kind == "F")
    delayed: list[Event] = []  # to be posted together with the next receive
    under_way: list[Event] = []  # posted, and waited for before the next send
    for n, (kind, i, event) in enumerate(work):
        step = 1 if kind == "F" else -1
        wait(post(delayed + wires.message(rank - step, rank, batch, i)))
        delayed = []
        queue.append(event)
        sent = wires.message(rank, rank + step, batch, i)
        if first - 1 <= n <= last:
            delayed = sent  # in the steady part, and where it begins
        if n < first:
            wait(under_way)
            under_way = []
        if n < first - 1:
            under_way = post(sent)
        elif n > last:
            wait(under_way)
            under_way = post(sent)
    wait(under_way)
