"""Runs the stages: each in a process of its own, with a time limit, so that none can spoil or delay the next.

This process imports everything and never touches CUDA; a stage's process is a fork of it, and starts in no time.
"""

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from gpu_stages.results import Results

NO_TIME = "not reached within the time limit"
# Of a stage's time: it stops by itself after this part, and is killed at the end.
_OWN_PART = 0.92


@dataclass
class Run:
    """What a stage is given.

    Attributes:
        device: where it computes.
        dry: whether it only tries its code on tiny sizes.
        deadline: when it should begin nothing new, in seconds of `time.monotonic`.
        send: takes a row's name and values.
        part: (number, count): which of so many processes of the stage this is.
    """

    device: torch.device
    dry: bool
    deadline: float
    send: Callable[[str, dict[str, Any]], None]
    part: tuple[int, int] = (0, 1)

    @property
    def cuda(self) -> bool:
        """Whether it computes on a GPU."""
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def attempt(self, name: str, measure: Callable[[], dict[str, Any]], **known: Any) -> bool:
        """Sends a row: what is known, and what `measure` returns, or the first line of its error.

        Returns:
            Whether there was no error.
        """
        if self.left < 0:
            self.send(name, known | {"error": NO_TIME})
            return False
        try:
            self.send(name, known | measure())
        except Exception as error:  # whatever fails: the next row may work
            self.send(name, known | {"error": one_line(error)})
            return False
        return True


@dataclass(frozen=True)
class Stage:
    """A stage of the benchmark.

    Attributes:
        name: what it is called.
        function: does it.
        share: of the time that is left, relative to the shares of later stages.
        about: what it finds out, in a line.
        processes: how many run it on the CPU during the other stages; 0: it is run in its turn.
    """

    name: str
    function: Callable[[Run], None]
    share: float
    about: str
    processes: int = 0


def one_line(error: BaseException) -> str:
    """An error in one line of at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}"[:300] if lines else type(error).__name__


@dataclass
class _Process:
    """A process of a stage that runs."""

    stage: Stage
    process: Any
    connection: Connection
    started: float
    limit: float
    error: str | None = field(default="it ended and gave no reason")


def run_stages(stages: Sequence[Stage], results: Results, device: torch.device, seconds: float) -> None:
    """Runs stages on a GPU within so many seconds.

    Args:
        stages: the stages; those with `processes` run during the others.
        results: takes their rows.
        device: where they compute.
        seconds: for all of them.
    """
    end = time.monotonic() + seconds
    background = []
    for stage in stages:
        if stage.processes:
            results.begin(stage.name, seconds)
            parts = [(number, stage.processes) for number in range(stage.processes)]
            background += [_start(stage, device, end - time.monotonic(), part) for part in parts]
    foreground = [stage for stage in stages if not stage.processes]
    for number, stage in enumerate(foreground):
        shares = sum(later.share for later in foreground[number:])
        limit = max(0.0, end - time.monotonic()) * stage.share / shares
        results.begin(stage.name, limit)
        process = _start(stage, device, limit)
        _receive([process, *background], process, results)
        results.end(stage.name, time.monotonic() - process.started, process.error)
    for process in background:
        _receive(background, process, results)
    for stage in stages:
        own = [process for process in background if process.stage is stage]
        if own:
            errors = [process.error for process in own if process.error]
            results.end(stage.name, time.monotonic() - own[0].started, errors[0] if errors else None)


def run_here(stages: Iterable[Stage], results: Results, seconds: float) -> None:
    """Runs stages tiny in this process, on the CPU, one after another: a dry run."""
    deadline = time.monotonic() + seconds
    for stage in stages:
        started, name = time.monotonic(), stage.name
        results.begin(name, deadline - started)
        run = Run(torch.device("cpu"), True, deadline, lambda row, values, name=name: results.row(name, row, values))
        error = _error_of(stage, run)
        results.end(name, time.monotonic() - started, error)


def _error_of(stage: Stage, run: Run) -> str | None:
    """Runs a stage; gives the line of the error that ended it, None without one."""
    try:
        stage.function(run)
    except Exception as error:  # whatever fails: the next stage may work
        return one_line(error)
    return None


def _start(stage: Stage, device: torch.device, limit: float, part: tuple[int, int] = (0, 1)) -> _Process:
    context, started = multiprocessing.get_context("fork"), time.monotonic()
    ours, theirs = context.Pipe(duplex=False)

    def work() -> None:
        ours.close()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        run = Run(device, False, started + _OWN_PART * limit, lambda *row: theirs.send(row), part)
        theirs.send(_error_of(stage, run))

    process = context.Process(target=work, daemon=True)
    process.start()
    theirs.close()  # so that the end of the process ends what is read from it
    return _Process(stage, process, ours, started, limit)


def _receive(processes: Iterable[_Process], until: _Process, results: Results) -> None:
    """Takes rows of processes until one of them has ended; a process at its limit is killed."""
    alive = {process.connection: process for process in processes if not process.connection.closed}
    while not until.connection.closed:
        rest = min(process.started + process.limit for process in alive.values()) - time.monotonic()
        for connection in wait(list(alive), max(0.0, rest)):
            process = alive[connection]
            try:
                message = connection.recv()
            except EOFError:
                process.process.join()
                if process.process.exitcode:
                    process.error = f"it ended with exit code {process.process.exitcode}"
                connection.close()
                del alive[connection]
                continue
            if isinstance(message, tuple):
                results.row(process.stage.name, *message)
            else:
                process.error = message
        for connection, process in list(alive.items()):
            if time.monotonic() > process.started + process.limit:
                process.process.kill()
                process.process.join()
                process.error = f"stopped at its limit of {process.limit:.0f} s"
                connection.close()
                del alive[connection]
