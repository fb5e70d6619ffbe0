"""What a process knows about the launcher that started it: where it meets the others, and that it ends with it.

The launcher is `--nproc`, or a bench, which starts runs of one process.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import NamedTuple, NoReturn

FOLDER = "LOCALPROP_JOB"
"""Names in the environment the folder, for its owner alone, in which the processes of a job on one machine meet."""
PIPE = "LOCALPROP_PIPE"
"""Names in the environment the descriptor of a pipe whose other end the launcher alone holds."""
# After the launcher's death, for a step to end and its checkpoint to be saved: of several processes, which hold ports,
# and of a process alone.
_GRACE_SECONDS, _GRACE_SECONDS_ALONE = 7, 120
_launcher_gone = threading.Event()
_stops_cleanly = threading.Event()


def job_folder() -> Path | None:
    """The folder in which the processes of this job meet; None where another starter has them meet over a network."""
    return Path(os.environ[FOLDER]) if FOLDER in os.environ else None


@contextmanager
def ends_with_us() -> Iterator[int]:
    """A pipe whose end this process alone holds; gives the descriptor to pass on, which `PIPE` has to name.

    Processes that get it are asked to stop as soon as the block is left, or this process has died.
    """
    reading, writing = os.pipe()  # `writing` is closed in processes that are started
    try:
        yield reading
    finally:
        os.close(writing)
        os.close(reading)


def watch_launcher() -> None:
    """Ends this process soon after the launcher that started it has died, for whatever reason.

    A process that trains is asked to stop first, as by SIGTERM, so that it saves a checkpoint if the step ends in time.
    Call it as early as possible, in the main thread. It does nothing in a process that no launcher started.
    """
    pipe = os.environ.pop(PIPE, None)
    if pipe is not None:
        os.set_inheritable(int(pipe), False)
        threading.Thread(target=_wait_for_launcher, args=(int(pipe),), daemon=True).start()


@contextmanager
def stops_cleanly() -> Iterator[None]:
    """Marks the part of a process in which it handles SIGTERM and needs time to stop after it."""
    _stops_cleanly.set()
    try:
        yield
    finally:
        _stops_cleanly.clear()


def _wait_for_launcher(pipe: int) -> None:
    os.read(pipe, 1)  # nothing is ever written: it returns when the other end is gone
    _launcher_gone.set()
    if _stops_cleanly.is_set():
        # The launcher may have passed a SIGTERM on before it died. Then this process is saving, and a second one kills.
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE_SECONDS if job_folder() else _GRACE_SECONDS_ALONE)
    leave(128 + signal.SIGTERM)


def leave(code: int) -> NoReturn:
    """Ends this process at once and its workers with it, without waiting for threads that talk to who is gone.

    The folder of the job is the launcher's to remove, and this process's where there is no launcher any more.
    """
    if _launcher_gone.is_set() and (folder := job_folder()):
        shutil.rmtree(folder, ignore_errors=True)
    for worker in multiprocessing.active_children():
        worker.kill()
    with suppress(OSError):  # the disk may be full
        _remove_temporaries()
    os._exit(code)


def _remove_temporaries() -> None:
    """Removes folders that libraries would remove at the end of the interpreter, which os._exit leaves out."""
    shutil.rmtree(get_temp_dir())  # multiprocessing's
    if torchs := getattr(sys.modules.get("torch.distributed.nn.jit.instantiator"), "_TEMP_DIR", None):
        torchs.cleanup()


class Ranks(NamedTuple):
    """The processes of a job: what each one trains, the run folder, and where its checkpoints are."""

    names: list[str]
    run: str
    checkpoints: str


def describe_ranks(ranks: Ranks) -> None:
    """Writes down for the launcher, if there is one, what the processes are."""
    if folder := job_folder():
        _write(folder / "ranks.json", json.dumps(ranks))


def described_ranks(folder: Path) -> Ranks | None:
    """What `describe_ranks` has written; None before that."""
    try:
        return Ranks(*json.loads((folder / "ranks.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def leave_failure(line: str) -> bool:
    """Lets the launcher show why the job has failed; returns whether there is one."""
    folder = job_folder()
    return folder is not None and _write(folder / "failure", line)


def failure_line(folder: Path) -> str | None:
    """The line of `leave_failure`; None where there is none."""
    path = folder / "failure"
    return path.read_text() if path.exists() else None


def _write(path: Path, text: str) -> bool:
    try:
        path.write_text(text)
    except OSError:  # the launcher and its folder are gone, or the disk is full
        return False
    return True
