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
from localprop.bench.runner import Job
from localprop.errors import LocalpropError, printable
from localprop.report.formats import format_accuracy, format_bytes, format_duration
from localprop.report.losses import read_losses
from localprop.report.results import read_results
from localprop.runs.description import read_description
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
        self._jobs: list[Job] = []
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

    def show(self, jobs: list[Job]) -> None:
        """Draws the table anew once in a second, and whenever a run has begun or ended."""
        self._jobs = jobs
        changed = [job for job in jobs if self._said.get(job.run.name, "waiting") != job.state]
        first = not self._said
        self._said = {job.run.name: job.state for job in jobs}
        now = time.monotonic()
        if self._live and (changed or now - self._drawn >= _REDRAW_SECONDS):
            self._drawn = now
            self._live.refresh()
        elif not self._live:
            if first:
                changed = [job for job in changed if job.state != "done"]
                self._console.out(self._heading(), highlight=False)
            for job in changed:
                cells = _cells(job)
                words = [f"{self._done()}/{len(jobs)}", job.state, job.run.name]
                words += [f"{cells['accuracy']}%", cells["memory"], cells["time"]] if job.state == "done" else []
                self._console.out(
                    printable("  ".join([*words, *([job.problem] if job.problem else [])])), highlight=False
                )

    def _done(self) -> int:
        return sum(job.state == "done" for job in self._jobs)

    def _heading(self) -> str:
        done, passed = self._done(), time.monotonic() - self._started
        words = [f"{self._name}: {done} of {len(self._jobs)} runs done"]
        words += [f"{count} {state}" for state in ("running", "failed") if (count := self._count(state))]
        return printable(", ".join([*words, format_duration(passed)]))

    def _count(self, state: str) -> int:
        return sum(job.state == state for job in self._jobs)

    def _display(self) -> RenderableType:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("run", no_wrap=True, overflow="ellipsis")
        for name in ("progress", "accuracy", "peak", "time"):
            table.add_column(name, justify="right", no_wrap=True)
        shown = self._window(self._console.height - 7)
        for job in shown:
            cells = _cells(job)
            columns = [cells[name] for name in ("progress", "accuracy", "memory", "time")]
            table.add_row(Text(printable(job.run.name)), *columns, style=_STYLES[job.state])
        hidden = len(self._jobs) - len(shown)
        failed = [Text(printable(f"{job.run.name}: {job.problem}"), style="red") for job in shown if job.problem]
        rest = [Text(f"and {hidden} more", style="dim")] if hidden else []
        return Group(Text(self._heading(), style="bold"), table, *rest, *failed)

    def _window(self, height: int) -> list[Job]:
        """As many jobs as fit: those around the first that has not ended."""
        height = max(height, 3)
        open_ones = [i for i, job in enumerate(self._jobs) if job.state in ("running", "waiting", "stopped")]
        first = open_ones[0] if open_ones else len(self._jobs)
        start = min(max(0, first - height // 2), max(0, len(self._jobs) - height))
        return self._jobs[start : start + height]


def _cells(job: Job) -> dict[str, str]:
    """The cells of a job's line; of a running one from the files that its trainer writes."""
    cells = {"progress": job.state if job.state != "waiting" else "", "accuracy": "", "memory": "", "time": ""}
    if job.state == "done":
        record = read_record(job.record)
        cost: dict[str, Any] = record.cost
        memory = cost["peak_memory"] or cost["predicted_memory"]
        cells["accuracy"] = format_accuracy(record.result["accuracy"])
        cells["memory"] = format_bytes(memory) if memory else ""
        cells["time"] = format_duration(cost["seconds"])
    elif job.state == "running" and job.started is not None:
        cells["time"] = format_duration(time.monotonic() - job.started)
        try:
            step = read_losses(job.folder / LOSSES)[-1][0]
            cells["progress"] = f"{100 * step / read_description(job.folder)['steps']:.0f}%"
            cells["accuracy"] = format_accuracy(read_results(Path(job.folder, RESULTS))[-1].accuracy)
        except (LocalpropError, IndexError, KeyError):
            pass  # it has just begun
    return cells
