"""Ctrl-C while a command imports torch, which needs seconds: it must not end in a traceback."""

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any


def catch_interrupts() -> None:
    """Lets Ctrl-C end `localprop COMMAND` with one line while its modules are imported.

    It changes nothing in a program that imports localprop as a library, or where Ctrl-C is ignored or handled already.
    """
    if not _is_command() or threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)


def release_interrupts() -> None:
    """Gives Ctrl-C back to Python, which raises a KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_command() -> bool:
    if sys.argv[:1] == ["-m"]:  # Python has not yet found the module that it is to run
        return ("-m", "localprop") in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    return Path(sys.argv[0] if sys.argv else "").stem == "localprop"


def _stop(number: int, frame: Any) -> None:
    # Not an exception: a library's import may turn that into another one, or swallow it.
    os.write(2, b"localprop: stopped\n")
    os._exit(128 + number)
