"""What is shown while a run trains."""

import math
import os
import time
from collections.abc import Sequence

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from localprop.errors import printable
from localprop.report.formats import format_bytes, format_duration, format_loss, format_speed
from localprop.report.results import EpochRow

SMOOTHING_SECONDS = 60  # over how much of the past the pace is averaged
REDRAW_SECONDS = 1 / 8
# How often a long epoch prints a line where there is no terminal.
LINE_SECONDS = 60


class Pace:
    """Estimates speed and time left, from the times at which steps and epochs end.

    What happens between the last step of an epoch and the first of the next (testing, saving) is timed apart.
    """

    def __init__(self, total: int, steps_per_epoch: int) -> None:
        self.total, self.steps_per_epoch = total, steps_per_epoch
        self.steps = self.step_seconds = 0.0  # both decay, so that their ratio follows the recent pace
        self.pause: float | None = None
        self.last: tuple[int, float] | None = None

    @property
    def seconds_per_step(self) -> float:
        """Smoothed; 0 until a step has been timed."""
        return self.step_seconds / self.steps if self.steps else 0.0

    def step(self, epoch: int, now: float) -> None:
        """A step of `epoch` (from 1) has ended."""
        if self.last and self.last[0] == epoch:
            passed = now - self.last[1]
            decay = math.exp(-passed / SMOOTHING_SECONDS)
            self.steps = self.steps * decay + 1
            self.step_seconds = self.step_seconds * decay + passed
        elif self.last:
            self.pause = max(now - self.last[1] - self.seconds_per_step, 0.0)
        self.last = epoch, now

    def epoch(self, now: float) -> None:
        """An epoch has been tested; a first measure of the pause, which lasts until the next step."""
        if self.last:
            self.pause = now - self.last[1]

    def seconds_left(self, epoch: int, step_in_epoch: int, tested: bool) -> float | None:
        """Seconds to the end of the last test, or None while nothing has been timed."""
        if not self.steps and self.pause is None:
            return None
        steps = self.total - (epoch - 1) * self.steps_per_epoch - step_in_epoch
        pauses = math.ceil(self.total / self.steps_per_epoch) - epoch + (not tested)
        return steps * self.seconds_per_step + pauses * (self.pause or 0.0)


class Progress:
    """Shows the progress of a run: a live display on a terminal, else (and under CI) a plain line per epoch.

    A context manager around the whole run.

    Args:
        console: where to.
        epochs: epochs of the whole run.
        steps_per_epoch: steps of an epoch.
        batch_size: examples per step.
        modules: number of local modules.
        rows: the epochs already done, of a resumed run.
        evaluated_on: "test" or "validation" images.
        unit: what an example is called.
        last_step: the step that training stops after, where that is before the end of the last epoch.
    """

    def __init__(
        self,
        console: Console,
        epochs: int,
        steps_per_epoch: int,
        batch_size: int,
        modules: int,
        rows: Sequence[EpochRow] = (),
        evaluated_on: str = "test",
        unit: str = "image",
        last_step: int | None = None,
    ) -> None:
        self._evaluated_on, self._unit = evaluated_on, unit
        self._total = epochs * steps_per_epoch if last_step is None else last_step
        self._console, self._epochs, self._steps = console, math.ceil(self._total / steps_per_epoch), steps_per_epoch
        self._batch_size, self._modules = batch_size, modules
        self._pace = Pace(self._total, steps_per_epoch)
        self._row = rows[-1] if rows else None
        self._epoch = self._row.epoch if self._row else 0
        self._step = self._steps_of(self._epoch) if self._row else 0
        self._losses = np.array(self._row.train_losses if self._row else [])
        self._seen = 0
        self._peak_memory = (self._row.peak_memory or 0) if self._row else 0
        self._drawn = time.monotonic()
        self._live = None
        if console.is_interactive and os.environ.get("CI", "").lower() in ("", "0", "false"):
            # Redrawn by hand: a thread that holds a lock while a data loader forks can hang the worker.
            self._live = Live(console=console, auto_refresh=False, get_renderable=self._display)

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def step(self, epoch: int, step_in_epoch: int, losses: Sequence[float], peak_memory: int) -> None:
        """A training step has ended.

        Args:
            epoch: the epoch it belongs to, from 1.
            step_in_epoch: steps of that epoch done, from 1.
            losses: local loss of each module; the mean over the epoch is shown.
            peak_memory: bytes; 0 if unknown.
        """
        now = time.monotonic()
        self._pace.step(epoch, now)
        if epoch != self._epoch:
            self._losses, self._seen = np.zeros(self._modules), 0
        self._seen += 1
        self._losses += (np.asarray(losses) - self._losses) / self._seen
        self._epoch, self._step, self._peak_memory = epoch, step_in_epoch, peak_memory
        if self._live and (now - self._drawn >= REDRAW_SECONDS or step_in_epoch == self._steps_of(epoch)):
            self._drawn = now
            self._live.refresh()
        elif not self._live and now - self._drawn >= LINE_SECONDS:
            self._drawn = now
            done = f"{step_in_epoch}/{self._steps_of(epoch)}"
            self.note(f"{self._counter()}  {done}  loss {self._plain_losses()}  {self._time()}")

    def epoch(self, row: EpochRow) -> None:
        """An epoch has been trained, and evaluated where that was due."""
        self._pace.epoch(time.monotonic())
        self._row, self._epoch, self._step = row, row.epoch, self._steps_of(row.epoch)
        self._losses, self._peak_memory = np.array(row.train_losses), row.peak_memory or 0
        self._drawn = time.monotonic()
        if self._live:
            self._live.refresh()
        else:
            self.note(self._plain_line(row))

    def _steps_of(self, epoch: int) -> int:
        """Steps that an epoch, counted from 1, comes to."""
        return min(self._steps, self._total - max(epoch - 1, 0) * self._steps)

    def note(self, line: str) -> None:
        """Prints a line, above the live display where there is one."""
        self._console.print(Text(printable(line)), soft_wrap=True)

    def _plain_line(self, row: EpochRow) -> str:
        memory = format_bytes(row.peak_memory) if row.peak_memory else ""
        return (
            f"{self._counter()}  loss {self._plain_losses()}  {self._evaluated_on} "
            f"{row.measures[0].text(row.headline):>6}{row.measures[0].sign}"
            f"  {format_speed(row.examples_per_second, self._unit):>13}  {memory:>8}  {self._time()}"
        )

    def _plain_losses(self) -> str:
        return " ".join(f"{format_loss(loss):>7}" for loss in self._losses)

    def _counter(self) -> str:
        return f"epoch {max(self._epoch, 1):>{len(str(self._epochs))}}/{self._epochs}"

    @property
    def _tested(self) -> bool:
        return self._row is not None and self._row.epoch == self._epoch

    def _time(self) -> str:
        if self._row and self._row.epoch == self._epochs:
            return f"in {format_duration(self._row.seconds)}"
        seconds = self._pace.seconds_left(self._epoch, self._step, self._tested)
        return "" if seconds is None else f"{format_duration(seconds)} left"

    def _display(self) -> RenderableType:
        width = self._console.width
        lines = [self._bar_line(width), *_number_lines("loss", [format_loss(x) for x in self._losses], width)]
        if self._row:
            headline = self._row.measures[0]
            lines += _number_lines(
                f"{'test' if self._evaluated_on == 'test' else 'val'} {headline.sign or headline.short}",
                [headline.text(score) for score in self._row.heads],
                width,
            )
        return Group(*lines)

    def _bar_line(self, width: int) -> RenderableType:
        counter = self._counter()
        steps = self._steps_of(self._epoch)
        done = f"{self._step}/{steps}" if self._tested or self._step < steps else "testing"
        rate = self._pace.seconds_per_step
        speed = self._batch_size / rate if rate else self._row.examples_per_second if self._row else 0.0
        memory = self._peak_memory
        # Of constant width, so that nothing jumps. What matters least comes first, and is first to go.
        parts = [
            f"{done:>{max(7, 2 * len(str(self._steps)) + 1)}}",
            f"{format_speed(speed, self._unit) if speed else '':>13}",
            f"{format_bytes(memory) if memory else '':>8}",
            f"{self._time():>12}",
        ]
        while (room := width - len(counter) - 2 - sum(2 + len(part) for part in parts)) < 10 and parts:
            parts.pop(0)
        completed = max(self._epoch - 1, 0) * self._steps + self._step
        line = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
        line.add_row(counter, ProgressBar(self._total, completed, width=max(room, 1)), *parts)
        return line


def _number_lines(label: str, cells: Sequence[str], width: int) -> list[Text]:
    """One cell per module, on as few lines as `width` allows; a line of nothing but dashes is left out."""
    lines = math.ceil(len(cells) / max((width - 12) // 8, 1))
    per_line = math.ceil(len(cells) / lines) if lines else 0
    texts = []
    for start in range(0, len(cells), per_line or 1):
        part = cells[start : start + per_line]
        if set(part) != {"-"}:
            modules = f"{start + 1}-{start + len(part)}" if lines > 1 else ""
            text = Text.assemble((f"{label:<6}" + (f"{modules:>6}" if modules else ""), "dim"))
            for k, cell in enumerate(part, start):
                text.append(f"{cell:>8}", "bold" if k == len(cells) - 1 else "")
            texts.append(text)
    return texts
