"""The processes that the launcher starts: the same command several times, signals passed on, and all end with one."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from localprop.errors import ParallelError
from localprop.system.launched import FOLDER, PIPE, described_ranks, ends_with_us, stops_cleanly

_POLL_SECONDS = 0.05
_NOTICE_SECONDS = 1  # in which processes see by themselves that one is gone
_GRACE_SECONDS = 30  # after SIGTERM


class Children:
    """Processes of one job on this machine.

    Attributes:
        ended: (rank, exit code) of each process, in the order in which they ended; below 0 the number of a signal.
        ended_by_us: ranks that had to be killed after another process had failed.
        signal: the number of the last signal that came to this process while they ran; 0 for none.
    """

    def __init__(self) -> None:
        self.ended: list[tuple[int, int]] = []
        self.ended_by_us: set[int] = set()
        self.signal = 0
        self._running: dict[int, subprocess.Popen] = {}
        self._came: list[int] = []

    def run(self, command: Sequence[str], count: int, folder: Path) -> None:
        """Starts a command `count` times, and returns when all have ended.

        When one fails, the others are ended. SIGTERM and SIGINT are passed on.

        Args:
            command: its words.
            count: number of processes.
            folder: where they meet.

        Raises:
            ParallelError: a process cannot be started.
        """
        with ends_with_us() as pipe:
            try:
                with self._signals():
                    self._start(command, count, folder, pipe)
                    self._wait(folder)
            finally:
                for child in self._running.values():  # only after an exception
                    child.kill()
                    child.wait()

    def _start(self, command: Sequence[str], count: int, folder: Path, pipe: int) -> None:
        own = {FOLDER: str(folder), PIPE: str(pipe), "WORLD_SIZE": str(count)}
        for rank in range(count):
            try:
                self._running[rank] = subprocess.Popen(
                    list(command),
                    stdin=subprocess.DEVNULL,
                    env=os.environ | own | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    pass_fds=(pipe,),
                    start_new_session=True,  # Ctrl-C is for the launcher, which passes it on
                )
            except OSError as error:
                raise ParallelError(
                    f"process {rank + 1} of {count} cannot be started ({error.strerror}); start fewer"
                ) from None

    def _wait(self, folder: Path) -> None:
        failed = None
        while self._running:
            for rank, child in list(self._running.items()):
                if (code := child.poll()) is not None:
                    del self._running[rank]
                    self.ended.append((rank, code))
                    failed = failed or (time.monotonic() if code else None)
            while self._came:
                self.signal = self._came.pop(0)
                # Before training begins there is nothing to save, and nothing to say for each process.
                early = described_ranks(folder) is None
                self._send(signal.SIGTERM if early or self.signal == signal.SIGHUP else self.signal)
            passed = time.monotonic() - failed if failed else 0
            if passed > _NOTICE_SECONDS and not self.ended_by_us:
                self.ended_by_us = set(self._running)
                self._send(signal.SIGTERM)
            if passed > _NOTICE_SECONDS + _GRACE_SECONDS:
                self._send(signal.SIGKILL)
            if self._running:
                time.sleep(_POLL_SECONDS)

    def _send(self, number: int) -> None:
        for child in self._running.values():
            with suppress(ProcessLookupError):
                child.send_signal(number)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Takes signals down; what nohup ignores stays ignored."""
        numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
        before = {number: signal.getsignal(number) for number in numbers}
        taken = [number for number in numbers if before[number] is not signal.SIG_IGN]
        for number in taken:
            signal.signal(number, lambda number, frame: self._came.append(number))
        try:
            with stops_cleanly():
                yield
        finally:
            for number in taken:
                signal.signal(number, before[number])
