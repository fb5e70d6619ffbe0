"""One way to train: where the chain is cut, and what each unit computes again; and what is kept beside weights."""

from typing import NamedTuple

from localprop.settings.recipe import Recomputation


class States(NamedTuple):
    """What is kept beside a weight from step to step, or between micro-batches, in bytes for each of the weight's.

    Attributes:
        always: in use all the time.
        own: in use only while the weight's module is trained: else it rests on the host.
        boundaries: whether the input of a module of exact training, too, is in use only while the module is at work.
    """

    always: float = 0.0
    own: float = 0.0
    boundaries: bool = False


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
