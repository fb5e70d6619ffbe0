"""`localprop bench`."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.table import Table

from localprop.bench.suite import Suite, find_suite, load_suite, shipped_suites
from localprop.errors import BenchError, listing, printable
from localprop.settings.bench import BenchConfig
from localprop.settings.flags import parse
from localprop.settings.values import parse_duration
from localprop.system.commands import command

if TYPE_CHECKING:
    from localprop.bench.runner import Attempt, Runner

UNFINISHED = 75  # the shell's EX_TEMPFAIL: call again


@dataclass(frozen=True)
class ReportOptions:
    """Write tables and pictures of suites' results: report.md and PNGs."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """Folder with results."""
    more: Annotated[
        tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="[FOLDER ...]", help_behavior_hint="")
    ] = ()
    """Further ones, for one page of all."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="NAME.md", help_behavior_hint="")] = None
    """The page (default: report.md in the folder); pictures are written beside it, under its name."""
    published: bool = False
    """Put the results beside published figures of local learning."""
    note: Annotated[str | None, tyro.conf.arg(metavar="SENTENCE", help_behavior_hint="")] = None
    """A sentence about the data for that page."""


def prepare(argv: Sequence[str]) -> Callable[[], int]:
    """Reads the flags of `bench`, or of `bench report`, and imports what runs or reports."""
    if not argv:
        return _list_suites
    if argv[0] == "report":
        return _prepare_report(argv[1:])
    if not argv[0].startswith("-"):
        find_suite(argv[0], "report")  # before its flags: a misspelt name is what is wrong
    options: BenchConfig = parse(BenchConfig, "bench", argv)
    suite = _chosen_suite(options, argv)
    if options.list:
        return lambda: _list_runs(suite)
    from localprop.bench.live import SuiteView

    runner = _runner(suite, options, argv)

    def run() -> int:
        console = Console()
        with SuiteView(console, suite.name) as view:
            jobs = runner.run(view.show)
        return _end(console, runner, jobs)

    return run


def _list_suites() -> int:
    console = Console()
    table = Table("suite", "runs", "", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for shipped in shipped_suites():
        table.add_row(shipped.name, str(len(shipped.runs)), shipped.description)
    console.print(table)
    console.out("\nlocalprop bench SUITE runs one; see localprop bench --help", highlight=False)
    return 0


def _prepare_report(argv: Sequence[str]) -> Callable[[], int]:
    options: ReportOptions = parse(ReportOptions, "bench report", argv)
    from localprop.bench.reports.report import write_report

    note = options.note or ""

    def report() -> int:
        for path in write_report(
            options.folder, *options.more, output=options.output, published=options.published, note=note
        ):
            Console().out(path, highlight=False)
        return 0

    return report


def _chosen_suite(options: BenchConfig, argv: Sequence[str]) -> Suite:
    """The suite with the runs that the flags choose."""
    suite = load_suite(options.suite, options.set, ("bench", *argv))
    known = {run.config.data.data for run in suite.runs}
    for name in options.data or {}:
        if name not in known:
            raise BenchError(f"--data {name}=...: {suite.name} has no such data; it has {listing(sorted(known))}")
    return suite.only(options.only) if options.only else suite


def _list_runs(suite: Suite) -> int:
    for run in suite.runs:
        Console().out(printable(run.name), highlight=False)
    return 0


def _runner(suite: Suite, options: BenchConfig, argv: Sequence[str]) -> "Runner":
    from localprop.bench.runner import Runner

    folder = options.output or Path("bench", suite.name)
    places = {name: getattr(options, name) for name in ("data_dir", "device", "download")}
    places = {name: value for name, value in places.items() if value}
    seconds = parse_duration(options.time_limit) if options.time_limit else None
    plugins = [Path(path) for path in options.plugin or ()]
    return Runner(suite, folder, options.jobs, places, options.data or {}, seconds, plugins, ("bench", *argv))


def _end(console: Console, runner: "Runner", jobs: "Sequence[Attempt]") -> int:
    """Shows how a suite ended; returns the exit code."""
    unfinished = [job for job in jobs if job.state in ("waiting", "stopped")]
    failed = [job for job in jobs if job.state == "failed"]
    failure = f"{len(failed)} of {len(jobs)} runs failed; {failed[0].run.name}: {failed[0].problem}" if failed else ""
    if unfinished:
        line = f"{len(unfinished)} of {len(jobs)} runs are not finished; the same command continues with them"
        console.out(line, highlight=False)
        if failure:
            print(f"localprop: {printable(failure)}", file=sys.stderr)
        return 128 + runner.signal if runner.signal else UNFINISHED
    if failure:
        raise BenchError(failure)
    console.out(f"tables and pictures: {command('bench', 'report', runner.folder)}", highlight=False)
    return 0
