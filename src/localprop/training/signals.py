"""SIGTERM and SIGINT ask a run to stop; it does so where it can save everything."""

import signal
from pathlib import Path
from typing import Any


class Interrupted(Exception):
    """A signal asked the run to stop; a checkpoint has been saved.

    Attributes:
        exit_code: of the process then.
    """

    def __init__(self, number: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; everything is in {checkpoint}")
        self.exit_code = 128 + number


class StopSignals:
    """A context in which SIGTERM and SIGINT are noted, and end nothing.

    The second signal of a kind ends the process as it would outside: a run may hang.

    Attributes:
        number: of the last signal that came; 0 for none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in self._before:
            signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        self.number = number
        signal.signal(number, self._before[number])
