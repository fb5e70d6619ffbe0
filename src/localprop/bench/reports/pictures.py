"""pareto.png, depth.png, curves.png, gap.png: how accurate a suite's series are, what they need, how they learn."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from localprop.bench.reports.frames import Point, color_of, draw_points, finish, name_points, panels_of, save
from localprop.bench.reports.gap import draw_gap
from localprop.bench.reports.groups import Comparison, pareto_front
from localprop.bench.reports.placing import label_ends, text_size
from localprop.bench.series import Series
from localprop.report.measures import ACCURACY, Measure
from localprop.report.texts import drawn as drawn_text

MOST_PANELS = 4


def draw_pareto(path: Path, comparisons: Sequence[Comparison], title: str) -> bool:
    """Draws score against peak memory: a panel per comparison, a point per series, and the front that none beats.

    Without a single score, memory alone as bars.

    Args:
        path: the PNG, 1400 pixels wide, replaced if it is there.
        comparisons: the first four are drawn; where some have scores, of these.
        title: above the picture.

    Returns:
        False, and writes nothing, if no memory is known.
    """
    shown = [comparison for comparison in comparisons if any(s.memory for s in comparison.series)]
    if not shown:
        return False
    scored = [comparison for comparison in shown if any(s.score and s.memory for s in comparison.series)]
    if scored:
        shown = scored[:MOST_PANELS]
        names = ", ".join(dict.fromkeys(comparison.measure.name for comparison in shown))
        figure, panels = panels_of(shown, f"{title}: {names} and peak memory", side=0.25)
        best = "accuracy" if names == ACCURACY.name else "score"
        what = f"bars: ± standard deviation over seeds; line: best {best} at that memory or less"
        figure.text(0.985, 1 - 0.16 / figure.get_figheight(), what, ha="right", va="top", fontsize=8, color="0.4")
        for axes, comparison in zip(panels, shown, strict=True):
            _pareto_panel(axes, comparison)
    else:
        shown = shown[:MOST_PANELS]
        figure, panels = panels_of(shown, f"{title}: peak memory of a training step", side=0.6, left=2.3)
        for axes, comparison in zip(panels, shown, strict=True):
            _memory_panel(axes, comparison)
    save(figure, path)
    return True


def draw_depth(path: Path, comparisons: Sequence[Comparison], title: str) -> bool:
    """Draws the score of each module's head over its depth; a line per series, end-to-end as a level.

    Args and return value as those of `draw_pareto`; nothing is drawn where no module inside a network has a score.
    """

    def inside(series: Series) -> bool:
        return any(score is not None for score in series.module_scores[:-1])

    shown = [comparison for comparison in comparisons if any(inside(s) for s in comparison.series)][:MOST_PANELS]
    if not shown:
        return False
    figure, panels = panels_of(shown, f"{title}: what each module's head knows", side=_side(shown))
    for axes, comparison in zip(panels, shown, strict=True):
        drawn = [s for s in comparison.series if inside(s) or (s.modules == 1 and s.score)]
        ends = []
        for series, color in zip(drawn, _shades(drawn), strict=True):
            values = np.array([np.nan if score is None else score for score in series.module_scores])
            if series.modules == 1 and series.score:
                axes.axhline(series.score.mean, color=color, linewidth=1.4, linestyle="--", zorder=1)
                ends.append((1.0, series.score.mean))
                continue
            known = np.flatnonzero(np.isfinite(values))
            depths = (known + 1) / series.modules
            axes.plot(depths, values[known], color=color, linewidth=1.5, marker="o", markersize=3.5, clip_on=False)
            ends.append((float(depths[-1]), float(values[known[-1]])))
        axes.set_xlim(0, 1)
        finish(axes, "depth (module / K)", _head_of(comparison.measure))
        label_ends(axes, ends, [drawn_text(s.short) for s in drawn], _shades(drawn))
    save(figure, path)
    return True


def draw_curves(path: Path, comparisons: Sequence[Comparison], title: str) -> bool:
    """Draws the training loss of the network's own (the last) module over steps, mean over seeds; a line per series.

    Args and return value as those of `draw_pareto`; nothing is drawn where no losses were kept.
    """
    shown = [comparison for comparison in comparisons if any(len(s.curve[0]) for s in comparison.series)][:MOST_PANELS]
    if not shown:
        return False
    figure, panels = panels_of(shown, f"{title}: training loss of the network", side=_side(shown))
    for axes, comparison in zip(panels, shown, strict=True):
        drawn = [s for s in comparison.series if len(s.curve[0])]
        colors, ends, lows, highs = _shades(drawn), [], [], []
        for series, color in zip(drawn, colors, strict=True):
            steps, losses = series.curve
            axes.plot(steps, losses, color=color, linewidth=1.3, marker="o" if len(steps) == 1 else None, clip_on=True)
            ends.append((float(steps[-1]), float(losses[-1])))
            lows.append(np.nanmin(losses))
            highs.append(np.nanpercentile(losses, 98) if len(losses) > 1 else losses[0])
        axes.set_xlim(0, max(end[0] for end in ends))
        # The first steps' losses would take most of the height.
        margin = 0.05 * (max(highs) - min(lows)) or 0.1
        axes.set_ylim(min(lows) - margin, max(highs) + margin)
        finish(axes, "step", "")
        label_ends(axes, ends, [drawn_text(s.short) for s in drawn], colors)
    save(figure, path)
    return True


def _pareto_panel(axes: Axes, comparison: Comparison) -> None:
    relative = comparison.baseline is not None and comparison.baseline.memory is not None
    known: list[Point] = []
    for series in comparison.series:
        memory = comparison.memory_ratio(series) if relative else series.memory
        if memory and series.score:
            scaled = memory if relative else memory / 2**20
            known.append(Point(series.short, series.method, scaled, series.score.mean, series.score.std or 0.0))
    if not known:
        text = f"no {drawn_text(comparison.measure.name)} is known"
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color="0.4")
        return
    percent, highest = comparison.measure.percent, max(p.y for p in known)
    points, spreads = draw_points(axes, known, 0.5 if percent else 0.04 * abs(highest))
    front = points[pareto_front([(p.x, comparison.measure.rank(p.y)) for p in known])]
    ends = np.append(front[1:, 0], axes.get_xlim()[1])
    # Each point's score is to be had from its memory on, until the next takes over.
    line = np.column_stack([np.ravel([front[:, 0], ends], order="F"), np.repeat(front[:, 1], 2)])
    axes.plot(*line.T, color="0.72", linewidth=1.6, zorder=1)
    unit = "end-to-end = 1" if relative else "MiB"
    finish(axes, f"peak memory of a training step ({unit})", drawn_text(comparison.measure.heading))
    name_points(axes, known, points, spreads, line)


def _head_of(measure: Measure) -> str:
    sign = f" ({measure.sign})" if measure.sign else ""
    return f"{drawn_text(measure.name)} of its head{sign}"


def _memory_panel(axes: Axes, comparison: Comparison) -> None:
    known = [series for series in comparison.series if series.memory]
    heights = [(series.memory or 0) / 2**20 for series in known]
    axes.barh(range(len(known)), heights, color=[color_of(s.method) for s in known], height=0.62)
    axes.invert_yaxis()
    axes.set_yticks(range(len(known)), [drawn_text(series.short) for series in known])
    for i, (series, height) in enumerate(zip(known, heights, strict=True)):
        ratio = comparison.memory_ratio(series)
        text = f" {height:.0f}" + (f"  ({ratio:.2f})" if ratio else "")
        axes.annotate(text, (height, i), va="center", fontsize=8.5, color="0.25", annotation_clip=False)
    finish(axes, "MiB" + (" (and against end-to-end)" if comparison.baseline else ""), "")
    axes.grid(visible=False, axis="y")


def _side(comparisons: Sequence[Comparison]) -> float:
    """Inches beside a panel for the names of its lines, at most two fifths of the picture."""
    inches = [
        0.0085 * text_size(len(comparison.series)) * len(s.short)
        for comparison in comparisons
        for s in comparison.series
    ]
    return min(max(inches) + 0.38, 4.0 if len(comparisons) == 1 else 2.3)


def _shades(drawn: Sequence[Series]) -> list[tuple[float, ...]]:
    """A colour per series: its method's, lighter from one to the next."""
    colors = []
    for series in drawn:
        alike = [s for s in drawn if s.method == series.method]
        light = 0.5 * alike.index(series) / len(alike)
        colors.append(tuple(light + (1 - light) * part for part in to_rgb(color_of(series.method))))
    return colors


PICTURES: dict[str, Callable[[Path, Sequence[Comparison], str], bool]] = {
    "pareto.png": draw_pareto,
    "depth.png": draw_depth,
    "curves.png": draw_curves,
    "gap.png": draw_gap,
}
