"""gap.png and front.png: how far local learning stays behind end-to-end training, against memory and time.

Those are measured on the suite's own network in gap.png, and those of a step at full size in front.png.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from localprop.bench.reports.costs import Cost, cost_of, costs
from localprop.bench.reports.frames import Point, draw_points, finish, name_points, panels, panels_of, save
from localprop.bench.reports.groups import Comparison
from localprop.bench.reports.ways import own_gap, way_parts, ways_of
from localprop.bench.series import BASELINE, Series
from localprop.report.measures import ACCURACY

_MOST = 2  # comparisons; each has two panels
_ACROSS: dict[str, Callable[[Comparison, Series], float | None]] = {
    "peak memory of a training step (end-to-end = 1)": Comparison.memory_ratio,
    "time of a training step (end-to-end = 1)": Comparison.time_ratio,
}
_FULL_SIZE = {
    "memory": "peak memory of a training step (end-to-end = 1)",
    "time": "time of a training step (end-to-end = 1)",
}


def draw_gap(path: Path, comparisons: Sequence[Comparison], title: str) -> bool:
    """Draws the gap to end-to-end training against memory and against time: two panels for each comparison.

    Args:
        path: the PNG, 1400 pixels wide, replaced if it is there.
        comparisons: the first two that have a gap, a memory and a time to show are drawn.
        title: above the picture.

    Returns:
        False, and writes nothing, if no comparison has these.
    """
    shown = [c for c in comparisons if all(len(_points(c, across)) > 1 for across in _ACROSS.values())][:_MOST]
    if not shown:
        return False
    measure = "accuracy" if all(c.measure == ACCURACY for c in shown) else "score"
    twice = [comparison for comparison in shown for _ in _ACROSS]
    figure, panels = panels_of(twice, f"{title}: {measure} less that of end-to-end training", side=0.25)
    what = "bars: ± standard deviation over seeds"
    figure.text(0.985, 1 - 0.16 / figure.get_figheight(), what, ha="right", va="top", fontsize=8, color="0.4")
    for axes, comparison, (name, across) in zip(panels, twice, [*_ACROSS.items()] * len(shown), strict=True):
        known, percent = _points(comparison, across), comparison.measure.percent
        points, spreads = draw_points(axes, known, 0.25 if percent else 0.04 * max(abs(p.y) for p in known))
        line = np.array([[axes.get_xlim()[0], 0.0], [axes.get_xlim()[1], 0.0]])
        axes.plot(*line.T, color="0.72", linewidth=1.6, zorder=1)
        finish(axes, name, "gap (points)" if percent else "gap")
        name_points(axes, known, points, spreads, line)
    save(figure, path)
    return True


def _points(comparison: Comparison, across: Callable[[Comparison, Series], float | None]) -> list[Point]:
    """The series that have both a gap and the other number."""
    points = []
    for series in comparison.series:
        gap, x = comparison.gap(series), across(comparison, series)
        if gap is not None and x is not None:
            points.append(Point(series.short, series.method, x, gap.mean, gap.std or 0.0))
    return points


def draw_front(path: Path, chosen: Mapping[str, Comparison]) -> bool:
    """Draws the mean gap over datasets against memory and time at full size: a point for each way whose cost is known.

    Exact rivals lie on the line: their gap is 0, because their gradients are those of end-to-end training.

    Args:
        path: the PNG, 1400 pixels wide, replaced if it is there.
        chosen: dataset to its comparison.

    Returns:
        False, and writes nothing, if no way has both a gap and a known cost.
    """
    found = gaps_at_full_size(chosen)
    if not found:
        return False
    rivals = [cost for cost in costs() if cost.exact]
    methods = list(dict.fromkeys([BASELINE, *(cost.way.method for cost in found)]))
    title = "Accuracy that local learning loses, and what a step of it takes"
    figure, drawn = panels(["against memory", "against time"], methods, title, side=0.25)
    bars = "bars: ± standard deviation over the datasets of each; " if len(chosen) > 1 else ""
    what = f"{bars}on the line: exact training"
    figure.text(0.985, 1 - 0.16 / figure.get_figheight(), what, ha="right", va="top", fontsize=8, color="0.4")
    for axes, (key, label) in zip(drawn, _FULL_SIZE.items(), strict=True):
        known = [_full_size_point(cost, key, gaps) for cost, gaps in found.items()]
        known += [_full_size_point(cost, key, [0.0]) for cost in rivals]
        points, spreads = draw_points(axes, known, 0.25)
        line = np.array([[axes.get_xlim()[0], 0.0], [axes.get_xlim()[1], 0.0]])
        axes.plot(*line.T, color="0.72", linewidth=1.6, zorder=1)
        finish(axes, label, "gap to end-to-end training (points)")
        name_points(axes, known, points, spreads, line)
    save(figure, path)
    return True


def gaps_at_full_size(chosen: Mapping[str, Comparison]) -> dict[Cost, list[float]]:
    """The gaps of each way with the default decoder, one for each dataset that has it, by its cost at full size."""
    found: dict[Cost, list[float]] = {}
    for comparison in chosen.values():
        for series in ways_of(comparison).values():
            cost, gap = cost_of(series), own_gap(comparison, series)
            if cost and gap and not cost.way.decoder:  # decoders hardly differ, and their names cover each other
                found.setdefault(cost, []).append(gap.mean)
    return found


def _full_size_point(cost: Cost, key: str, gaps: list[float]) -> Point:
    spread = float(np.std(gaps, ddof=1)) if len(gaps) > 1 else 0.0
    return Point(_short(cost), cost.way.method, getattr(cost, key), float(np.mean(gaps)), spread)


def _short(cost: Cost) -> str:
    if cost.exact:
        return cost.name or (f"exact K={cost.way.modules}" if cost.way.modules > 1 else BASELINE)
    return ", ".join([f"K={cost.way.modules}", *way_parts(cost.way)])
