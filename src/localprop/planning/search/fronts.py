"""Fronts: of many ways to do a thing, those that no other beats in memory and in time at once."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Indices = NDArray[np.int64]

MOST = 256
"""Ways that a front keeps. Of more, those that need nearly the same memory are left out, but for the fastest."""
_EQUAL = 1e-9  # relative: times that differ by rounding alone are equal


class Front(NamedTuple):
    """Ways to do something, from the one with the least memory to the fastest. All arrays have the shape (ways,).

    Attributes:
        need: bytes at most at any moment, ascending.
        seconds: expected time, descending.
        choice: which of the options at hand a way takes.
        after: for each way, the number of the way in which it goes on.
    """

    need: Numbers
    seconds: Numbers
    choice: Indices
    after: Indices

    def within(self, limit: float) -> int | None:
        """The number of the fastest way that needs no more than `limit` bytes; None if all need more."""
        found = int(np.searchsorted(self.need, limit, "right"))
        return found - 1 if found else None


def front(need: Numbers, seconds: Numbers, choice: Indices, after: Indices, most: int = MOST) -> Front:
    """The front of ways in any order; see `Front`."""
    order = np.lexsort((seconds, need))
    need, seconds, choice, after = need[order], seconds[order], choice[order], after[order]
    fastest = np.minimum.accumulate(seconds)
    better = np.flatnonzero(np.concatenate(([True], seconds[1:] < fastest[:-1] * (1 - _EQUAL))))
    if len(better) > most:
        better = better[_thinned(need[better], most)]
    return Front(need[better], seconds[better], choice[better], after[better])


def _thinned(need: Numbers, most: int) -> Indices:
    """Of equal steps of memory the last way each, and the very first."""
    step = np.floor((need - need[0]) / (need[-1] - need[0]) * (most - 2))
    last = np.flatnonzero(np.concatenate((step[1:] != step[:-1], [True])))
    return np.concatenate(([0], last)) if last[0] else last


def both(one: Front, other: Front, beside: float) -> tuple[Numbers, Numbers, Indices, Indices]:
    """Doing one thing and then another, `beside` bytes more being in use meanwhile.

    Returns:
        need, seconds, and for each way the number of the way in which each of the two is done.
    """
    need = np.union1d(one.need, other.need + beside)
    need = need[need >= max(one.need[0], other.need[0] + beside)]
    first = np.searchsorted(one.need, need, "right") - 1
    second = np.searchsorted(other.need + beside, need, "right") - 1
    return need, one.seconds[first] + other.seconds[second], first, second
