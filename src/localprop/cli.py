"""The command line: `localprop train | plan | bench | eval | export | chain`."""

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from localprop.errors import BenchError, ConfigError, LocalpropError, listing, printable, suggestion
from localprop.settings.config import BenchConfig, ModelConfig, PlanConfig, TrainConfig
from localprop.settings.flags import parse
from localprop.settings.flat import free, from_flat, to_flat
from localprop.settings.trust import require_typed
from localprop.settings.values import OptionalFloat, OptionalInt, OptionalPath, OptionalStr, parse_duration, read_yaml
from localprop.system.commands import command
from localprop.system.startup import release_interrupts

USAGE = """\
usage: localprop COMMAND [OPTIONS]

Train transformers, and any other timm model, without end-to-end backpropagation.

  train          train a model by local learning; without options, a small Swin on handwritten digits
  plan           memory and time of training, predicted without a GPU and without data; --budget tells what fits
  bench SUITE    a grid of training runs under one protocol, and a report with tables and pictures
  eval RUN       accuracy of a run's weights
  export RUN     a run's weights as a folder that timm.create_model loads
  chain MODEL    the units that a timm model can be cut into

localprop COMMAND --help tells a command's options.
"""

NEWEST = "newest"
UNFINISHED = 75  # the shell's EX_TEMPFAIL: call again


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code.

    0, or 2 for a user's mistake, 75 for a suite whose time is up with runs left, 128 + signal.
    """
    release_interrupts()
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if argv else 2
    try:
        if argv[0] == "--version":
            from localprop import __version__

            print(f"localprop {__version__}")
            return 0
        if argv[0] not in COMMANDS:
            raise ConfigError(f"no command is called {argv[0]!r}; {suggestion(argv[0], COMMANDS)}")
        code = COMMANDS[argv[0]](argv[1:])
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whom it is piped to has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except LocalpropError as error:
        print(f"localprop: {printable(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:  # of a path that the user has named, or of the disk
        if error.filename is None:
            raise
        print(f"localprop: {printable(f'{error.filename}: {error.strerror}; check the path')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # outside of training, which saves a checkpoint first
        print("localprop: stopped", file=sys.stderr)
        return 130


def _train(argv: Sequence[str]) -> int:
    """Train a model by local learning. -c FILE.yaml sets defaults; flags win."""
    flags = argv
    argv, files = _take_config_files(argv)
    argv = _bare_resume(argv)
    words = ("train", *flags)
    config: TrainConfig = parse(TrainConfig, "train", argv, _over(TrainConfig(), files, words))
    if config.run.resume is None:
        return _start(config, None, flags)
    from localprop.runs.description import CONFIG, read_config
    from localprop.runs.folder import is_unbegun, newest_run

    folder = newest_run(config.run.output) if config.run.resume == NEWEST else Path(config.run.resume)
    own = read_config(folder, _named_plugin(folder, config.backbone.plugin, words))
    if is_unbegun(folder):  # else the weights that it began with are not loaded again
        require_typed({"model_kwargs": own.backbone.model_kwargs}, str(folder / CONFIG), words)
    config = parse(TrainConfig, "train", argv, _over(own, files, words))
    before, after = to_flat(own), to_flat(config)
    may_differ = free("resume")
    if all(settings["data"].startswith("folder:") for settings in (before, after)):
        may_differ.add("data")  # a folder may have moved
    for key, value in after.items():
        if value != before[key] and key not in may_differ:
            flag = key.replace("_", "-")
            raise ConfigError(f"--{flag} was {before[key]} when {folder} began; resume without it, or start a new run")
    return _start(config, folder, flags)


def _start(config: TrainConfig, resumed: Path | None, flags: Sequence[str]) -> int:
    """Trains in this process, or starts as many as are asked for."""
    # torchrun, or this very function, started this process as one of several.
    if config.run.parallel and "RANK" not in os.environ:
        from localprop.parallel.launch import launch

        if config.run.nproc is None:
            raise ConfigError("--parallel needs --nproc, the number of processes, or a start by torchrun")
        return launch(config, config.run.nproc, flags)
    from localprop.runs.run import run

    return run(config, resumed)


def _plan(argv: Sequence[str]) -> int:
    from localprop.planning.tables import draw_plan, plan_table, processes_table
    from localprop.runs.advice import plan_lines, plan_model, plan_report
    from localprop.system.files import write_text

    words = ("plan", *argv)
    argv, files = _take_config_files(argv)
    config: PlanConfig = parse(PlanConfig, "plan", argv, _over(PlanConfig(), files, words))
    for path in (config.picture, config.json):
        if path and not path.resolve().parent.is_dir():
            raise ConfigError(f"{path} cannot be written: there is no folder {path.resolve().parent}; make it first")
        if path and path.exists() and not path.is_file():  # such as /dev/stdout, which must not be replaced
            raise ConfigError(f"{path} is no regular file; name a file to write")
    console = Console()
    with console.status("") as status:
        result, title = plan_model(config, lambda setting: status.update(f"simulating {setting.name} ..."))
    console.print(plan_table(result, title))
    if config.parallel:
        console.print(processes_table(result))
    drawn = result.choice if result.choice and result.choice.setting.modules > 1 else result.typical
    draw_plan(config.picture, result, drawn, f"{title}: memory over one training step")
    if config.json:
        write_text(config.json, json.dumps(plan_report(config, result), indent=1) + "\n")
    for line in plan_lines(config, result):
        console.out(line, highlight=False)
    return 0


def _bench(argv: Sequence[str]) -> int:
    from localprop.bench.live import SuiteView
    from localprop.bench.reports.report import write_report
    from localprop.bench.runner import Runner
    from localprop.bench.suite import find_suite, load_suite, shipped_suites

    console = Console()
    if not argv:
        table = Table("suite", "runs", "", box=None, pad_edge=False)
        table.columns[1].justify = "right"
        for shipped in shipped_suites():
            table.add_row(shipped.name, str(len(shipped.runs)), shipped.description)
        console.print(table)
        console.out("\nlocalprop bench SUITE runs one; see localprop bench --help", highlight=False)
        return 0
    if argv[0] == "report":
        report: ReportOptions = parse(ReportOptions, "bench report", argv[1:])
        for path in write_report(report.folder):
            console.out(path, highlight=False)
        return 0
    if not argv[0].startswith("-"):
        find_suite(argv[0], "report")  # before its flags: a misspelt name is what is wrong
    options: BenchConfig = parse(BenchConfig, "bench", argv)
    words = ("bench", *argv)
    suite = load_suite(options.suite, options.set, words)
    known = {run.config.data.data for run in suite.runs}
    for name in options.data or {}:
        if name not in known:
            raise BenchError(f"--data {name}=...: {suite.name} has no such data; it has {listing(sorted(known))}")
    if options.only:
        suite = suite.only(options.only)
    if options.list:
        for run in suite.runs:
            console.out(printable(run.name), highlight=False)
        return 0
    folder = options.output or Path("bench", suite.name)
    places = {name: getattr(options, name) for name in ("data_dir", "device", "download")}
    seconds = parse_duration(options.time_limit) if options.time_limit else None
    places = {name: value for name, value in places.items() if value}
    plugins = [Path(path) for path in options.plugin or ()]
    runner = Runner(suite, folder, options.jobs, places, options.data or {}, seconds, plugins, words)
    with SuiteView(console, suite.name) as view:
        jobs = runner.run(view.show)
    left = [job for job in jobs if job.state in ("waiting", "stopped")]
    failed = [job for job in jobs if job.state == "failed"]
    failure = f"{len(failed)} of {len(jobs)} runs failed; {failed[0].run.name}: {failed[0].problem}" if failed else ""
    if left:
        console.out(f"{len(left)} of {len(jobs)} runs are left; the same command goes on", highlight=False)
        if failure:
            print(f"localprop: {printable(failure)}", file=sys.stderr)
        return 128 + runner.signal if runner.signal else UNFINISHED
    if failure:
        raise BenchError(failure)
    console.out(f"tables and pictures: {command('bench', 'report', folder)}", highlight=False)
    return 0


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """Tables and pictures of a suite's results: report.md and PNGs, written into their folder."""

    folder: tyro.conf.Positional[Path]
    """Folder with results."""


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """Accuracy of a run's weights on its test images, or on others."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    data: OptionalStr = None
    """Other data, such as folder:PATH (default: the run's own)."""
    data_dir: OptionalPath = None
    """Where torchvision's datasets lie (default: the run's own)."""
    batch_size: OptionalInt = None
    """Images per batch (default: the run's own)."""
    val_split: OptionalFloat = None
    """Evaluate on that part of the training images instead, as a run with the same --val-split does."""
    download: bool = False
    """Download the dataset if it is not there."""
    device: OptionalStr = None
    """cpu, cuda, ... (default: cuda if there is one)."""
    plugin: OptionalPath = None
    """The plugin that the run was trained with: its code runs only if it is named."""


def _eval(argv: Sequence[str]) -> int:
    from localprop.runs.evaluation import evaluate_run

    options: EvalOptions = parse(EvalOptions, "eval", argv)
    changes = {k: getattr(options, k) for k in ("data", "data_dir", "batch_size", "val_split", "download", "device")}
    plugin = _named_plugin(options.run, options.plugin, ("eval", *argv))
    result, notes = evaluate_run(options.run, {k: v for k, v in changes.items() if v is not None}, plugin)
    _note(notes)
    print(json.dumps(result, indent=2))
    return 0


def _note(lines: Sequence[str]) -> None:
    for line in lines:
        print(f"localprop: {line}", file=sys.stderr)


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """A run's weights as a folder that timm.create_model loads: model.safetensors and config.json."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    output: OptionalPath = None
    """Folder to write (default: RUN/export)."""
    plugin: OptionalPath = None
    """The plugin that the run was trained with: its code runs only if it is named."""


def _export(argv: Sequence[str]) -> int:
    from localprop.runs.evaluation import export_run

    options: ExportOptions = parse(ExportOptions, "export", argv)
    plugin = _named_plugin(options.run, options.plugin, ("export", *argv))
    folder, code, notes = export_run(options.run, options.output, plugin)
    _note(notes)
    print(f"{folder}\n\n{code}")
    return 0


@dataclasses.dataclass(frozen=True)
class ChainOptions(ModelConfig):
    """The units that a timm model can be cut into: their output shapes and parameters."""

    model: tyro.conf.Positional[str] = dataclasses.field(kw_only=True)
    """Name of a timm model."""


def _chain(argv: Sequence[str]) -> int:
    from localprop.models.backbone import create_backbone
    from localprop.tracing.chains import chain

    options: ChainOptions = parse(ChainOptions, "chain", argv)
    model, _ = create_backbone(options, None)
    units = chain(model, (3, options.img_size, options.img_size) if options.img_size else None)
    channels, height, width = units.input_size
    title = Text(printable(f"{options.model}, {channels}x{height}x{width}"))
    table = Table("", "unit", "output", "parameters", title=title, box=None)
    table.columns[0].justify = table.columns[2].justify = table.columns[3].justify = "right"
    for i, unit in enumerate(units, 1):
        count = sum(model.get_parameter(name).numel() for name in unit.parameters)
        table.add_row(str(i), Text(printable(unit.name)), " x ".join(map(str, unit.shape)), f"{count:,}")
    Console().print(table)
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": _train,
    "plan": _plan,
    "bench": _bench,
    "eval": _eval,
    "export": _export,
    "chain": _chain,
}


def _take_config_files(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes `-c FILE` out of the flags; gives the flags and the files."""
    rest, files, words = [], [], iter(argv)
    for word in words:
        flag, equals, path = word.partition("=")
        if flag not in ("-c", "--config"):
            rest.append(word)
            continue
        files.append(path if equals else next(words, ""))
        if not files[-1]:
            raise ConfigError("-c needs a YAML file of settings")
    return rest, files


def _over(config: Any, files: list[str], words: Sequence[str]) -> Any:
    """The settings of `-c` files over a config; `words` are the command line, which decides what files may not."""
    for file in files:
        settings = read_yaml(Path(file))
        config = from_flat(settings, file, config)
        require_typed(settings, file, words)
    return config


def _named_plugin(folder: Path, named: Path | None, words: Sequence[str]) -> Path | None:
    """The plugin of a run, if the command line names it; see `require_plugin`."""
    from localprop.runs.description import require_plugin

    note = require_plugin(folder, named, words)
    if note and "RANK" not in os.environ:  # of several processes, who started them has said it
        _note([note])
    return named


def _bare_resume(argv: list[str]) -> list[str]:
    """Lets `--resume` stand alone: it then means the newest run."""
    result = []
    for i, word in enumerate(argv):
        result.append(word)
        if word == "--resume" and (i + 1 == len(argv) or argv[i + 1].startswith("-")):
            result.append(NEWEST)
    return result
