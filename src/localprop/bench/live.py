"""What is shown while a suite runs: a live table on a terminal, else a line for each run that ends."""

import os
import time
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from localprop.bench.record import read_record
from localprop.bench.runner import Attempt
from localprop.errors import LocalpropError, printable
from localprop.report.formats import format_bytes, format_duration
from localprop.report.losses import read_losses
from localprop.report.results import read_results
from localprop.runs.description import measures_of, read_description
from localprop.training.outputs import LOSSES, RESULTS

_REDRAW_SECONDS = 1.0
_STYLES = {"done": "", "running": "bold", "waiting": "dim", "stopped": "yellow", "failed": "red"}


class SuiteView:
    """Shows a suite filling up. A context manager; call `show` as often as you like.

    Args:
        console: where to.
        name: of the suite.
    """

    def __init__(self, console: Console, name: str) -> None:
        self._console, self._name = console, name
        self._started = self._drawn = time.monotonic()
        self._attempts: list[Attempt] = []
        self._said: dict[str, str] = {}
        self._live = None
        if console.is_interactive and os.environ.get("CI", "").lower() in ("", "0", "false"):
            self._live = Live(console=console, auto_refresh=False, get_renderable=self._display)

    def __enter__(self) -> "SuiteView":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, attempts: list[Attempt]) -> None:
        """Draws the table anew once in a second, and whenever a run has begun or ended."""
        self._attempts = attempts
        changed = [attempt for attempt in attempts if self._said.get(attempt.run.name, "waiting") != attempt.state]
        first = not self._said
        self._said = {attempt.run.name: attempt.state for attempt in attempts}
        now = time.monotonic()
        if self._live and (changed or now - self._drawn >= _REDRAW_SECONDS):
            self._drawn = now
            self._live.refresh()
        elif not self._live:
            if first:
                changed = [attempt for attempt in changed if attempt.state != "done"]
                self._console.out(self._heading(), highlight=False)
            for attempt in changed:
                cells = _cells(attempt)
                words = [f"{self._done()}/{len(attempts)}", attempt.state, attempt.run.name]
                words += [cells["score"], cells["memory"], cells["time"]] if attempt.state == "done" else []
                self._console.out(
                    printable("  ".join([*words, *([attempt.problem] if attempt.problem else [])])), highlight=False
                )

    def _done(self) -> int:
        return sum(attempt.state == "done" for attempt in self._attempts)

    def _heading(self) -> str:
        done, passed = self._done(), time.monotonic() - self._started
        words = [f"{self._name}: {done} of {len(self._attempts)} runs done"]
        words += [f"{count} {state}" for state in ("running", "failed") if (count := self._count(state))]
        return printable(", ".join([*words, format_duration(passed)]))

    def _count(self, state: str) -> int:
        return sum(attempt.state == state for attempt in self._attempts)

    def _display(self) -> RenderableType:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("run", no_wrap=True, overflow="ellipsis")
        for name in ("progress", "score", "peak", "time"):
            table.add_column(name, justify="right", no_wrap=True)
        shown = self._window(self._console.height - 7)
        for attempt in shown:
            cells = _cells(attempt)
            columns = [cells[name] for name in ("progress", "score", "memory", "time")]
            table.add_row(Text(printable(attempt.run.name)), *columns, style=_STYLES[attempt.state])
        hidden = len(self._attempts) - len(shown)
        failed = [
            Text(printable(f"{attempt.run.name}: {attempt.problem}"), style="red")
            for attempt in shown
            if attempt.problem
        ]
        rest = [Text(f"and {hidden} more", style="dim")] if hidden else []
        return Group(Text(self._heading(), style="bold"), table, *rest, *failed)

    def _window(self, height: int) -> list[Attempt]:
        """As many attempts as fit: those around the first that has not ended."""
        height = max(height, 3)
        open_ones = [
            i for i, attempt in enumerate(self._attempts) if attempt.state in ("running", "waiting", "stopped")
        ]
        first = open_ones[0] if open_ones else len(self._attempts)
        start = min(max(0, first - height // 2), max(0, len(self._attempts) - height))
        return self._attempts[start : start + height]


def _cells(attempt: Attempt) -> dict[str, str]:
    """The cells of an attempt's line; of a running one from the files that its trainer writes."""
    cells = {"progress": attempt.state if attempt.state != "waiting" else "", "score": "", "memory": "", "time": ""}
    if attempt.state == "done":
        record = read_record(attempt.record)
        cost: dict[str, Any] = record.cost
        memory = cost["peak_memory"] or cost["predicted_memory"]
        cells["score"] = record.measure.text(record.score) + record.measure.sign
        cells["memory"] = format_bytes(memory) if memory else ""
        cells["time"] = format_duration(cost["seconds"])
    elif attempt.state == "running" and attempt.started is not None:
        cells["time"] = format_duration(time.monotonic() - attempt.started)
        try:
            step = read_losses(attempt.folder / LOSSES)[-1][0]
            description = read_description(attempt.folder)
            steps = attempt.run.config.run.steps or description["steps"]
            cells["progress"] = f"{100 * step / steps:.0f}%"
            row = read_results(Path(attempt.folder, RESULTS), measures_of(description))[-1]
            cells["score"] = row.measures[0].text(row.headline) + row.measures[0].sign
        except (LocalpropError, IndexError, KeyError):
            pass  # it has just begun
    return cells
