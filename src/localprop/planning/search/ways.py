"""One way to train: where the chain is cut, and what each unit computes again."""

from typing import NamedTuple

from localprop.settings.recipe import Recomputation


class Way(NamedTuple):
    """A way to train.

    Attributes:
        ends: after how many units each module ends.
        recomputation: for each module, what each of its units computes again in backward.
        need: bytes at the peak, as far as they are composed of costs.
        seconds: expected time of a step, likewise.
    """

    ends: list[int]
    recomputation: list[list[Recomputation]]
    need: float
    seconds: float
