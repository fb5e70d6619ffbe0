"""gap.png: how far local learning stays behind end-to-end training, against the memory and the time of a step."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from localprop.bench.reports.frames import Point, draw_points, finish, name_points, panels_of, save
from localprop.bench.reports.groups import Comparison
from localprop.bench.series import Series
from localprop.report.measures import ACCURACY

_MOST = 2  # comparisons; each has two panels
_ACROSS: dict[str, Callable[[Comparison, Series], float | None]] = {
    "peak memory of a training step (end-to-end = 1)": Comparison.memory_ratio,
    "time of a training step (end-to-end = 1)": Comparison.time_ratio,
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
            points.append(Point(series, x, gap.mean, gap.std or 0.0))
    return points
