"""Runs a suite: every run is a `localprop train` of its own, several at once, resumed where they were cut off."""

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from localprop.bench.collect import collect, differing, settings_in
from localprop.bench.record import read_record, write_record
from localprop.bench.suite import Suite, SuiteRun, check_run_name
from localprop.data.identity import require_same
from localprop.data.loading import folder_identity
from localprop.data.sources import named_settings
from localprop.errors import BenchError, DataError, LocalpropError
from localprop.runs.recorded_recipe import changed_default
from localprop.settings.config import DataConfig
from localprop.settings.flat import free, from_flat, to_flags, to_flat
from localprop.settings.trust import require_plugins
from localprop.system.commands import interpreter_words, plugin_words
from localprop.system.files import make_folder, open_to_write, refuse_link, remove_leftovers, remove_tree
from localprop.system.launched import PIPE, ends_with_us
from localprop.training.checkpoints.folder import has_checkpoint
from localprop.training.outputs import CHECKPOINTS

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 120  # for a step to end and its checkpoint to be saved
_RUNS, _LOGS = "runs", "logs"


@dataclass
class Attempt:
    """An attempt at a run of the suite, and how far it has come.

    Attributes:
        state: "done" has a record; "stopped" is resumed next time; "failed" has `problem`.
        started: when it was started, by `time.monotonic`; None before.
        problem: the last line of what a failed run printed.
    """

    run: SuiteRun
    folder: Path
    log: Path
    record: Path
    state: Literal["waiting", "running", "done", "stopped", "failed"] = "waiting"
    process: subprocess.Popen | None = None
    started: float | None = None
    problem: str = ""


@dataclass
class Runner:
    """Runs a suite into a folder: FOLDER/<run>.json, and FOLDER/runs and FOLDER/logs, which may be deleted after.

    Args:
        suite: what to run.
        folder: where to.
        jobs: runs at once.
        places: settings that depend on the machine: data_dir, device.
        data: folders of images in place of named datasets.
        seconds: after how long to stop, between two steps; None for never.
        plugins: those that the user has named; runs of the suite may use these alone.
        words: the command line, for a message that says how to name them.

    Attributes:
        list: what there is to run and how far it is; empty before.
        signal: the number of the signal that stopped it; 0 for none.
    """

    suite: Suite
    folder: Path
    jobs: int = 1
    places: dict[str, Any] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    seconds: float | None = None
    plugins: Sequence[Path] = ()
    words: Sequence[str] = ("bench", "SUITE")

    def __post_init__(self) -> None:
        self.list: list[Attempt] = []
        self.signal = 0
        self._stopping = False
        self._identities: dict[tuple[str, float], dict[str, Any]] = {}

    def run(self, show: Callable[[list[Attempt]], None]) -> list[Attempt]:
        """Runs what has no result yet; calls `show` again and again, and at the end.

        Raises:
            BenchError: a result or a checkpoint that is there is of other settings or data, the folder cannot be
                written to, or another bench runs in it.
        """
        started = time.monotonic()
        plugins = [run.config.backbone.plugin for run in self.suite.runs]
        require_plugins(plugins, self.plugins, self.suite.name, self.words)
        with alone_in(self.folder) as lock, ends_with_us() as pipe, self._signals():
            remove_leftovers(self.folder)
            for name in (_RUNS, _LOGS):
                make_folder(self.folder / name)
            self.list = [self._attempt(run) for run in self.suite.runs]
            while True:
                for attempt in self.list:
                    if attempt.process is not None and attempt.process.poll() is not None:
                        self._end(attempt, attempt.process.returncode)
                if self.signal or (self.seconds and time.monotonic() - started >= self.seconds):
                    self._stop()
                    break
                running = sum(attempt.process is not None for attempt in self.list)
                waiting = [attempt for attempt in self.list if attempt.state == "waiting"]
                for attempt in waiting[: self.jobs - running]:
                    self._start(attempt, lock, pipe)
                show(self.list)
                if not running and not waiting:
                    break
                time.sleep(_POLL_SECONDS)
        show(self.list)
        return self.list

    def _attempt(self, run: SuiteRun) -> Attempt:
        check_run_name(run.name, self.suite.name)
        folder, record = self.folder / _RUNS / run.name, self.folder / f"{run.name}.json"
        attempt = Attempt(run, folder, self.folder / _LOGS / f"{run.name}.log", record)
        refuse_link(folder)
        if record.exists():
            known = read_record(record)
            found, place, state, recipe = known.config, record, "done", known.network.get("recipe")
            device = known.cost.get("device", "cpu")
            self._require_same_data(run.config.data, known.data.get("identity"), record)
        elif has_checkpoint(folder / CHECKPOINTS):
            found, place, state = settings_in(folder, run), folder, "waiting"
            recipe, device = None, "cpu"  # it is resumed with its own
        elif os.path.lexists(folder) and not attempt.log.is_file():
            # Every run that a bench starts has a log: what has none was put there by somebody else.
            raise BenchError(
                f"{folder} was not made by this bench and has no checkpoint; move it away, or choose another --output"
            )
        else:
            return attempt
        difference = differing(found, run)
        if state == "done" and not difference:
            difference = changed_default(run.config.local.recipe, recipe, device)
        if difference:
            raise BenchError(f"{place} is of other settings ({difference}); delete it or choose another --output")
        attempt.state = state  # type: ignore[assignment]
        return attempt

    def _require_same_data(self, config: DataConfig, identity: Any, record: Path) -> None:
        """Compares the folder that a result is of with the one that is there now, if it still is.

        Raises:
            BenchError: they differ.
        """
        source = f"folder:{self.data[config.data]}" if config.data in self.data else config.data
        known = identity.get("source") if isinstance(identity, dict) else identity
        if known != "folder" or not source.startswith("folder:") or not Path(source[7:]).expanduser().is_dir():
            return
        key = (source, config.val_split)
        try:
            if key not in self._identities:
                self._identities[key] = folder_identity(replace(config, data=source))
            require_same(identity, self._identities[key], str(record), "delete it to run it again")
        except DataError as error:
            raise BenchError(str(error)) from None

    def _start(self, attempt: Attempt, lock: int, pipe: int) -> None:
        name, places = attempt.run.config.data.data, dict(self.places)
        if name in self.data:
            # A folder does not tell what a named dataset does.
            own = to_flat(attempt.run.config)
            places |= {key: value for key, value in named_settings(name).items() if own[key] is None}
            places["data"] = f"folder:{self.data[name]}"
        if has_checkpoint(attempt.folder / CHECKPOINTS):
            flags = ["--resume", str(attempt.folder), *plugin_words(attempt.run.config.backbone.plugin)]
            unrecorded = free("config")
            places |= {key: value for key, value in to_flat(attempt.run.config).items() if key in unrecorded and value}
            flags += to_flags(from_flat(places, "bench"), places)
        else:
            remove_tree(attempt.folder, self.folder / _RUNS)  # cut off before its first checkpoint
            places |= {"output": str(attempt.folder.parent), "experiment": attempt.folder.name, "checkpoint_hist": 1}
            flags = to_flags(from_flat(places, "bench", attempt.run.config))
        cores = max(1, (os.cpu_count() or 1) // self.jobs)
        with os.fdopen(open_to_write(attempt.log, os.O_APPEND), "a") as log:
            attempt.process = subprocess.Popen(
                interpreter_words("train", *flags),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": str(cores), **os.environ, PIPE: str(pipe)},
                start_new_session=True,  # Ctrl-C is for the bench, which passes it on
                # The folder stays locked until the last run has saved and ended, which it does when this process dies.
                pass_fds=(lock, pipe),
            )
        attempt.state, attempt.started = "running", time.monotonic()

    def _end(self, attempt: Attempt, code: int) -> None:
        attempt.process = None
        if code in (0, 2):
            self._finish(attempt, code)
        elif code in (128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL) and self._stopping:
            attempt.state = "stopped"  # below 0: before it could save anything
        else:
            attempt.state, attempt.problem = "failed", f"exit code {code} (see {attempt.log})"

    def _finish(self, attempt: Attempt, code: int) -> None:
        """Takes down what a run came to, or why it did not come to its end."""
        try:
            if code:
                lines = [line for line in attempt.log.read_text(errors="replace").splitlines() if line.strip()]
                raise BenchError(lines[-1].removeprefix("localprop: ") if lines else f"see {attempt.log}")
            write_record(attempt.record, collect(attempt.folder, self.suite.name, attempt.run, self.jobs))
            attempt.state = "done"
            # The weights stay; the optimizer's states, three times as large, have done their part.
            remove_tree(attempt.folder / CHECKPOINTS, attempt.folder)
        except LocalpropError as error:
            again = (
                f"; to begin it anew, delete {attempt.folder}" if has_checkpoint(attempt.folder / CHECKPOINTS) else ""
            )
            attempt.state, attempt.problem = "failed", f"{error}{again} (log: {attempt.log})"

    def _stop(self) -> None:
        """Lets running runs save what they have, and end."""
        self._stopping = True
        running = [attempt for attempt in self.list if attempt.process]
        for attempt in running:
            attempt.process.terminate()  # type: ignore[union-attr]
        for attempt in running:
            try:
                code = attempt.process.wait(_GRACE_SECONDS)  # type: ignore[union-attr]
            except subprocess.TimeoutExpired:
                attempt.process.kill()  # type: ignore[union-attr]
                code = attempt.process.wait()  # type: ignore[union-attr]
            self._end(attempt, code)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def remember(number: int, frame: Any) -> None:
            self.signal = number
            signal.signal(number, before[signal.Signals(number)])  # a second one ends what hangs

        before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def alone_in(folder: Path) -> Iterator[int]:
    """Keeps a second bench out of the folder; gives the descriptor of the lock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.fdopen(open_to_write(folder / ".lock"), "r+")
    except OSError as error:
        raise BenchError(f"cannot write into {folder}: {error.strerror}; choose another --output") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BenchError(
                f"another bench runs in {folder}, or its last run is still being saved; wait for it, or "
                "choose another --output"
            ) from None
        try:
            yield lock.fileno()
        except OSError as error:
            place = error.filename or folder
            raise BenchError(
                f"the suite cannot continue: {place}: {error.strerror}; mend that, then give the same command"
            ) from None
