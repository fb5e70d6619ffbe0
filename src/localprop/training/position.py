"""Where a run stands, how long it took to come there, and how a checkpoint says so."""

import time
from dataclasses import dataclass, field
from typing import Any

from localprop.system.reading import AMOUNT, COUNT, LOSS, NULL, TEXT, Malformed, check

_POSITION = {
    "epoch": COUNT,
    "batch": COUNT,
    "seconds": AMOUNT,
    "epoch_seconds": AMOUNT,
    "loss_sums": [LOSS],
    "peak": (COUNT, NULL),
    "layout": TEXT,
}


@dataclass
class Position:
    """Where a run stands; saved with each checkpoint."""

    epoch: int = 0
    """Epochs completed."""
    batch: int = 0
    """Batches completed of the epoch under way."""
    seconds: float = 0.0
    """Wall clock so far, summed over resumes."""
    epoch_seconds: float = 0.0
    """Seconds spent on training batches of the last epoch that was begun."""
    loss_sums: list[float] = field(default_factory=list)
    """Sum of each module's losses over those batches."""
    peak: int | None = None
    """Measured peak memory of a step in bytes."""
    layout: str = ""
    """The processes that measured it, in words."""

    def begin_epoch(self) -> None:
        """Forgets losses and time of the epoch before."""
        self.loss_sums = [0.0] * len(self.loss_sums)
        self.epoch_seconds = 0.0

    def add_losses(self, losses: list[float]) -> None:
        """Adds the losses of a step, one per module."""
        self.loss_sums = [total + loss for total, loss in zip(self.loss_sums, losses, strict=True)]


def read_position(meta: Any, step: int, modules: int, epochs: int, steps_per_epoch: int) -> Position:
    """The position that a checkpoint's `meta` has.

    Args:
        meta: a dict with "position": the fields of one.
        step: optimizer steps done, as the checkpoint has them.
        modules: number of local modules.
        epochs: epochs of the run.
        steps_per_epoch: steps of each.

    Raises:
        Malformed: it has another form, or a run cannot have stood there.
    """
    check(meta, {"position": _POSITION})
    saved = meta["position"]
    if unknown := saved.keys() - _POSITION.keys():
        raise Malformed(f"position has {str(min(unknown, key=str))[:40]!r}, which is unknown")
    position = Position(**saved)
    if len(position.loss_sums) != modules:
        raise Malformed(f"position.loss_sums has {len(position.loss_sums)} entries")
    ends = position.epoch + (position.batch > 0) > epochs
    # A signal may come after the last batch of an epoch, which is not finished then.
    if ends or position.batch > steps_per_epoch or step != position.epoch * steps_per_epoch + position.batch:
        raise Malformed(f"epoch {position.epoch}, batch {position.batch} is not step {step} of this run")
    if step and not position.epoch_seconds:
        raise Malformed("position.epoch_seconds is 0 after steps")
    return position


class Clock:
    """Measures how long training and evaluation take, and adds that to a position."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begins to measure."""
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def lap(self, position: Position, training: bool) -> tuple[float, float]:
        """Adds the time since the start, or the lap before, to a position.

        Args:
            position: where the run stands.
            training: whether the time was spent on training batches.

        Returns:
            The time in seconds: on the clock, and of the processor in all threads.
        """
        wall, processor = self._wall, self._processor
        self.start()
        passed, busy = self._wall - wall, self._processor - processor
        position.seconds += passed
        if training:
            position.epoch_seconds += passed
        return passed, busy
