"""Which of several processes trains which modules, and how many batches they have in flight."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from localprop.division.partition import balanced
from localprop.errors import ParallelError, counted

IN_FLIGHT = 2
"""Batches that a stage has sent and that are not taken yet, and as many that the next has room for: who is ahead waits
then, so that a slow stage makes no memory grow."""


@dataclass(frozen=True)
class Placement:
    """Which process trains which modules: stages of consecutive modules, and replicas of each.

    Rank `replica * len(stages) + stage` is a process's number: what stages send each other stays near.

    Attributes:
        stages: the modules of each stage.
        replicas: processes that train the same modules, on a part of each batch.
    """

    stages: tuple[range, ...]
    replicas: int = 1

    def __str__(self) -> str:
        """Such as "4 processes (1-2 | 3-4, 2 replicas)"."""
        count = len(self.stages) * self.replicas
        stages = " | ".join(map(numbers, self.stages))
        replicas = f", {self.replicas} replicas" if self.replicas > 1 else ""
        return f"{counted(count, 'process', 'processes')} ({stages}{replicas})"

    @property
    def reporter(self) -> int:
        """The rank that knows all losses: the last stage's first."""
        return len(self.stages) - 1

    def place(self, rank: int) -> tuple[int, int]:
        """(stage, replica) of a process."""
        replica, stage = divmod(rank, len(self.stages))
        return stage, replica

    def ranks(self, stage: int) -> list[int]:
        """The processes that train the modules of a stage."""
        return [replica * len(self.stages) + stage for replica in range(self.replicas)]


def numbers(modules: range) -> str:
    """Of consecutive modules, counted from 1: "3", or "3-4"."""
    first, last = modules[0] + 1, modules[-1] + 1
    return str(first) if first == last else f"{first}-{last}"


def arrange(kind: str, modules: int, processes: int, seconds: Sequence[float] | None = None) -> Placement:
    """Shares modules out to processes.

    Args:
        kind: "modules": consecutive ones to each, so that the slowest process is as fast as can be; from twice as many
            processes as modules on, replicas of that. Or "data": all modules to each.
        modules: number of local modules.
        processes: number of processes.
        seconds: expected time of each module in a step; all the same, if left out.

    Raises:
        ParallelError: there are more processes than modules, and not a multiple of them.
    """
    if kind == "data":
        return Placement((range(modules),), processes)
    replicas = max(1, processes // modules)
    if processes > replicas * modules:
        raise ParallelError(
            f"{processes} processes cannot share {modules} modules; take at most {modules}, or a multiple such as "
            f"{(replicas + 1) * modules}"
        )
    costs = seconds or [1.0] * modules
    ends = balanced(modules, processes // replicas, lambda _, start, stop: sum(costs[start:stop]))
    return Placement(tuple(range(start, stop) for start, stop in pairwise([0, *ends])), replicas)
