"""Which process trains which modules."""

from collections.abc import Sequence
from itertools import pairwise

from localprop.errors import ParallelError
from localprop.partition import balanced


def assign(modules: int, processes: int, seconds: Sequence[float] | None = None) -> list[range]:
    """Shares modules out to processes, consecutive ones to each.

    Args:
        modules: number of local modules.
        processes: number of processes.
        seconds: expected time of each module in a step; all the same, if left out.

    Returns:
        The modules of each process: so that the slowest process is as fast as can be.

    Raises:
        ParallelError: there are more processes than modules.
    """
    if processes > modules:
        raise ParallelError(
            f"{processes} processes for {modules} modules; at most one for each: --nproc {modules}, or more --modules"
        )
    costs = seconds or [1.0] * modules
    ends = balanced(modules, processes, lambda start, stop: sum(costs[start:stop]))
    return [range(start, stop) for start, stop in pairwise([0, *ends])]
