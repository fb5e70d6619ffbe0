"""Where to cut a chain: exact, by dynamic programming over the runs of consecutive units."""

from collections.abc import Callable, Sequence
from functools import cache

from localprop.tracing.units import Chain


def balanced(size: int, modules: int, cost: Callable[[int, int, int], float]) -> list[int]:
    """Cuts a chain of `size` units into runs so that the dearest run is as cheap as can be.

    Among the partitions that reach this minimum, the one with the smallest sum of squared costs is taken, so that
    the other runs are even too.

    Args:
        size: number of units.
        modules: number of runs, from 1 to `size`.
        cost: cost of the run number `index` (from 0), which has units [start, stop); called with (index, start, stop).

    Returns:
        The end of each run; the last is `size`.
    """
    cost = cache(cost)
    dearest = _partition(size, modules, cost, max)[0]
    _, ends = _partition(
        size, modules, lambda *run: float("inf") if cost(*run) > dearest else cost(*run) ** 2, lambda a, b: a + b
    )
    return ends


def _partition(
    size: int, modules: int, cost: Callable[[int, int, int], float], combine: Callable[[float, float], float]
) -> tuple[float, list[int]]:
    """The cheapest partition of units [0, size) where the costs of its runs are combined by `combine`."""
    best: dict[tuple[int, int], tuple[float, list[int]]] = {}
    for count in range(1, modules + 1):
        # Each run after it needs a unit, and the last run has all that are left.
        for stop in range(count, size - modules + count + 1) if count < modules else [size]:
            if count == 1:
                best[count, stop] = cost(0, 0, stop), [stop]
                continue
            options = []
            for start in range(count - 1, stop):
                before, ends = best[count - 1, start]
                options.append((combine(before, cost(count - 1, start, stop)), [*ends, stop]))
            best[count, stop] = min(options, key=lambda option: option[0])
    return best[modules, size]


def balanced_exact(
    size: int, modules: int, cost: Callable[[int, int, int], float], crossing: Callable[[int], float]
) -> list[int]:
    """Cuts a chain of `size` units into runs for exact training, so that its peak is as low as can be.

    What crosses the cuts up to a run waits while that run is at work. Among the partitions that reach the lowest peak,
    one with the longest last run is taken: all others run twice.

    Args:
        size: see `balanced`, and so the next two.
        modules: see there.
        cost: the peak of a run alone.
        crossing: what crosses a cut after so many units.

    Returns:
        The end of each run; the last is `size`.
    """
    cost = cache(cost)

    @cache
    def lowest(start: int, count: int) -> float:
        """The lowest peak of units [start, size) in `count` runs, beside what crosses the cuts up to `start`."""
        if count == 1:
            return cost(modules - 1, start, size)
        stops = range(start + 1, size - count + 2)
        return min(max(cost(modules - count, start, i), crossing(i) + lowest(i, count - 1)) for i in stops)

    limit = lowest(0, modules)
    # By the end of the run before: the least that may cross the cuts up to there, and the ends.
    waiting: dict[int, tuple[float, list[int]]] = {0: (0, [])}
    for index in range(modules - 1):
        found: dict[int, tuple[float, list[int]]] = {}
        for start, (beside, ends) in waiting.items():
            for stop in range(start + 1, size - modules + index + 2):
                own = beside + crossing(stop)
                if beside + cost(index, start, stop) <= limit and (stop not in found or own < found[stop][0]):
                    found[stop] = own, [*ends, stop]
        waiting = found
    start = min(i for i, (beside, _) in waiting.items() if beside + cost(modules - 1, i, size) <= limit)
    return [*waiting[start][1], size]


def stage_ends(chain: Chain) -> list[int]:
    """The ends of the stages: runs of units whose outputs have one shape.

    What comes before the first block belongs to the first stage, and the classifier to the last.
    """
    shapes = [unit.shape for unit in chain]
    ends = [i for i in range(1, len(shapes)) if shapes[i] != shapes[i - 1]]
    ends = [end for end in ends if len(shapes[end]) > 1]  # a pooled vector is the classifier's, no stage of its own
    # A stage that is a single unit at the very front is the stem, where later stages are longer.
    if len(ends) > 1 and ends[0] == 1:
        ends = ends[1:]
    return [*ends, len(shapes)]


def module_ends(chain: Chain, ends: Sequence[int], min_depth: int) -> list[int]:
    """Those of `ends` after which a module may end: after a block, and after the last unit; with `min_depth` 0, all."""
    return [end for end in ends if not min_depth or chain[end - 1].depth or end == len(chain)]


def most_modules(chain: Chain, ends: Sequence[int], min_depth: int) -> int:
    """The largest number of modules, each of at least `min_depth` blocks, that end after some of `ends`."""
    count = depth = start = 0
    for end in module_ends(chain, ends, min_depth):
        depth += sum(unit.depth for unit in chain[start:end])
        start = end
        if depth >= min_depth:
            count, depth = count + 1, 0
    return count
