"""Processes that end with the one that started them."""

import ctypes
import os
from contextlib import suppress
from multiprocessing import parent_process

_PR_SET_PDEATHSIG = 1


def end_with_parent(number: int) -> None:
    """Has the kernel send this process a signal as soon as its parent ends. Only Linux can do that.

    Args:
        number: of the signal.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    parent = parent_process()
    if parent is not None and not parent.is_alive():  # it ended before the kernel knew
        os._exit(0)
