"""Runs a suite: every run is a `localprop train` of its own, several at once, resumed where they were cut off."""

import ctypes
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from localprop.bench.collect import collect, differing, with_places
from localprop.bench.record import read_record, write_record
from localprop.bench.suite import Suite, SuiteRun
from localprop.config import to_flags
from localprop.errors import BenchError, LocalpropError
from localprop.trainer import CHECKPOINTS

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 120  # for a step to end and its checkpoint to be saved
_RUNS, _LOGS = "runs", "logs"


@dataclass
class Job:
    """A run of the suite, and how far it is.

    Attributes:
        state: "done" has a record; "stopped" goes on next time; "failed" has `problem`.
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
    seconds: float = 0.0
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

    Raises:
        BenchError: a result that is there is of other settings, or another bench runs in the folder.
    """

    suite: Suite
    folder: Path
    jobs: int = 1
    places: dict[str, Any] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    seconds: float | None = None

    def __post_init__(self) -> None:
        self.list = [self._job(run) for run in self.suite.runs]
        self.signal = 0
        unknown = set(self.data) - {run.config.data.data for run in self.suite.runs}
        if unknown:
            known = sorted({run.config.data.data for run in self.suite.runs})
            raise BenchError(
                f"--data {min(unknown)}=...: {self.suite.name} has no such data; it has {', '.join(known)}"
            )

    def run(self, show: Callable[[list[Job]], None]) -> list[Job]:
        """Runs what has no result yet; calls `show` again and again, and at the end."""
        started = time.monotonic()
        with self._alone(), self._signals():
            while True:
                for job in self.list:
                    if job.process is not None and job.process.poll() is not None:
                        self._end(job, job.process.returncode)
                if self.signal or (self.seconds and time.monotonic() - started >= self.seconds):
                    self._stop()
                    break
                running = sum(job.process is not None for job in self.list)
                waiting = [job for job in self.list if job.state == "waiting"]
                for job in waiting[: self.jobs - running]:
                    self._start(job)
                show(self.list)
                if not running and not waiting:
                    break
                time.sleep(_POLL_SECONDS)
        show(self.list)
        return self.list

    def _job(self, run: SuiteRun) -> Job:
        folder, record = self.folder / _RUNS / run.name, self.folder / f"{run.name}.json"
        job = Job(run, folder, self.folder / _LOGS / f"{run.name}.log", record)
        if record.exists():
            found = read_record(record)
            if difference := differing(found, run):
                raise BenchError(f"{record} is of other settings ({difference}); delete it or choose another --output")
            job.state, job.seconds = "done", found.cost["seconds"]
        return job

    def _start(self, job: Job) -> None:
        flags = ["--resume", str(job.folder)]
        if not any(job.folder.glob(f"{CHECKPOINTS}/step-*")):
            shutil.rmtree(job.folder, ignore_errors=True)  # cut off before its first checkpoint
            name = job.run.config.data.data
            data = {"data": f"folder:{self.data[name]}"} if name in self.data else {}
            places = {**self.places, **data, "output": str(job.folder.parent), "experiment": job.folder.name}
            flags = to_flags(with_places(job.run, {**places, "checkpoint_hist": 1}))
        job.log.parent.mkdir(parents=True, exist_ok=True)
        cores = max(1, (os.cpu_count() or 1) // self.jobs)
        with job.log.open("a") as log:
            job.process = subprocess.Popen(
                [sys.executable, "-m", "localprop", "train", *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": str(cores), **os.environ},
                start_new_session=True,  # Ctrl-C is for the bench, which passes it on
                preexec_fn=_die_with_parent,
            )
        job.state, job.started = "running", time.monotonic()

    def _end(self, job: Job, code: int) -> None:
        job.process, job.seconds = None, time.monotonic() - (job.started or 0)
        if code in (128 + signal.SIGTERM, -signal.SIGTERM):  # below 0: before it could save anything
            job.state = "stopped"
        elif code:
            lines = [line for line in job.log.read_text(errors="replace").splitlines() if line.strip()]
            reason = lines[-1].removeprefix("localprop: ") if code == 2 and lines else f"exit code {code}"
            job.state, job.problem = "failed", f"{reason} (see {job.log})"
        else:
            try:
                write_record(job.record, collect(job.folder, self.suite.name, job.run, self.jobs))
                job.state = "done"
                # The weights stay; the optimizer's states, three times as large, have done their part.
                shutil.rmtree(job.folder / CHECKPOINTS, ignore_errors=True)
            except LocalpropError as error:
                job.state, job.problem = "failed", str(error)

    def _stop(self) -> None:
        """Lets running runs save what they have, and end."""
        running = [job for job in self.list if job.process]
        for job in running:
            job.process.terminate()  # type: ignore[union-attr]
        for job in running:
            try:
                code = job.process.wait(_GRACE_SECONDS)  # type: ignore[union-attr]
            except subprocess.TimeoutExpired:
                job.process.kill()  # type: ignore[union-attr]
                code = job.process.wait()  # type: ignore[union-attr]
            self._end(job, code)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps a second bench out of the folder."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / ".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield
        except BlockingIOError:
            raise BenchError(f"another bench runs in {self.folder}; wait for it, or choose another --output") from None
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise BenchError(f"cannot write into {self.folder}: {error.strerror}; choose another --output") from None

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def remember(number: int, frame: Any) -> None:
            self.signal = number

        before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _die_with_parent() -> None:
    """Ends a run when the bench is killed, or the next bench would find it still writing (Linux only)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
