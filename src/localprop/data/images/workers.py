"""Worker processes of a DataLoader that end when they should, and no sooner."""

import atexit
import os
import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from multiprocessing.util import get_temp_dir
from typing import Any

from torch.utils.data import DataLoader

from localprop.errors import DataError, shown
from localprop.system.processes import end_with_parent

_TO_A_GROUP = (signal.SIGTERM, signal.SIGINT)
# A socket's path has at most 107 bytes on Linux, 103 on macOS; multiprocessing calls it "/listener-" and 8 characters.
_LONGEST_FOLDER = 103 - 18
_running: dict[BaseProcess, int] = {}  # and the process that started them: one that it forks inherits the table


def set_up_worker(number: int) -> None:
    """Leaves signals that reach a whole group to the process that trains, which still wants batches; ends with it."""
    for other in _TO_A_GROUP:
        signal.signal(other, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _TO_A_GROUP)
    end_with_parent(signal.SIGKILL)


def batches_of(loader: DataLoader) -> Generator[Any, None, None]:
    """What a loader gives. However that ends, its workers do not run on, not even one that hangs.

    Raises:
        DataError: the temporary folder cannot hold their sockets; or a worker was killed. That is noticed within five
            seconds of waiting for its batch.
    """
    workers: set[BaseProcess] = set()
    try:
        yield from _started(loader, workers)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        pid = str(error).removeprefix("DataLoader worker (pid").removeprefix("(s)").partition(")")[0].strip()
        raise DataError(
            f"a process that decodes images (pid {pid}) was killed; where memory or shared memory (/dev/shm) ran out, "
            "use fewer --workers, and resume the run"
        ) from None
    finally:
        _end(workers)


def _started(loader: DataLoader, workers: set[BaseProcess]) -> Iterator[Any]:
    """Starts a loader; `workers` gets those that it has started, also when that fails, before a signal can come."""
    if loader.num_workers:
        # For the workers' sockets, made here: each worker would make one that stays when the worker is killed.
        folder = get_temp_dir()
        if len(os.fsencode(folder)) > _LONGEST_FOLDER:
            raise DataError(
                f"the temporary folder {shown(folder)} has too long a name for the sockets of processes that decode "
                "images; set TMPDIR to a folder with a shorter name, or pass --workers 0"
            )
    before, handler = set(active_children()), signal.getsignal(signal.SIGCHLD)
    # Workers inherit this, until they ignore these signals.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _TO_A_GROUP)
    try:
        with _safe_path():
            return iter(loader)
    finally:
        workers |= set(active_children()) - before
        _running.update(dict.fromkeys(workers, os.getpid()))
        # torch would raise an error wherever this process is when a worker is killed, in a checkpoint being saved too.
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def exits_on_sigterm() -> Iterator[None]:
    """Inside, SIGTERM raises SystemExit where it would end this process at once and leave workers' temporary folder."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


@contextmanager
def _safe_path() -> Iterator[None]:
    """Keeps the current folder, which may be a stranger's, off the path of interpreters that multiprocessing starts.

    They get the path of this one, but only after they have imported modules of their own. Python 3.10 has no such
    variable; it forks workers on Linux.
    """
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


@atexit.register
def _end_all() -> None:
    """Before multiprocessing waits for workers that ignore its SIGTERM: an error may hold on to their loader."""
    _end(set(_running))


def _end(workers: set[BaseProcess]) -> None:
    own = [worker for worker in workers if _running.pop(worker, None) == os.getpid()]
    for worker in own:
        worker.kill()
    for worker in own:
        worker.join(1)  # longer takes only one that hangs in the kernel
