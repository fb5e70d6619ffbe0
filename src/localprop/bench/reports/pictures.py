"""pareto.png, depth.png, curves.png: how accurate a suite's series are, what they need, and how they learn."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from localprop.bench.reports.groups import Comparison, pareto_front
from localprop.bench.reports.placing import label_ends, label_points, text_size
from localprop.bench.series import BASELINE, Series
from localprop.report.measures import ACCURACY, Measure
from localprop.report.texts import drawn as drawn_text
from localprop.system.files import written_aside

MOST_PANELS = 4
_COLORS = {
    BASELINE: "#222222", "feature-reconstruction": "#1f6fb4", "infopro": "#d1690b", "greedy": "#2b8a4a",
}  # fmt: skip
_DPI = 140


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
        figure, panels = _panels(shown, f"{title}: {names} and peak memory", side=0.25)
        best = "accuracy" if names == ACCURACY.name else "score"
        what = f"bars: ± standard deviation over seeds; line: best {best} at that memory or less"
        figure.text(0.985, 1 - 0.16 / figure.get_figheight(), what, ha="right", va="top", fontsize=8, color="0.4")
        for axes, comparison in zip(panels, shown, strict=True):
            _pareto_panel(axes, comparison)
    else:
        shown = shown[:MOST_PANELS]
        figure, panels = _panels(shown, f"{title}: peak memory of a training step", side=0.6, left=2.3)
        for axes, comparison in zip(panels, shown, strict=True):
            _memory_panel(axes, comparison)
    _save(figure, path)
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
    figure, panels = _panels(shown, f"{title}: what each module's head knows", side=_side(shown))
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
        _finish(axes, "depth (module / K)", _head_of(comparison.measure))
        label_ends(axes, ends, [drawn_text(s.short) for s in drawn], _shades(drawn))
    _save(figure, path)
    return True


def draw_curves(path: Path, comparisons: Sequence[Comparison], title: str) -> bool:
    """Draws the training loss of the network's own (the last) module over steps, mean over seeds; a line per series.

    Args and return value as those of `draw_pareto`; nothing is drawn where no losses were kept.
    """
    shown = [comparison for comparison in comparisons if any(len(s.curve[0]) for s in comparison.series)][:MOST_PANELS]
    if not shown:
        return False
    figure, panels = _panels(shown, f"{title}: training loss of the network", side=_side(shown))
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
        _finish(axes, "step", "")
        label_ends(axes, ends, [drawn_text(s.short) for s in drawn], colors)
    _save(figure, path)
    return True


def _pareto_panel(axes: Axes, comparison: Comparison) -> None:
    relative = comparison.baseline is not None and comparison.baseline.memory is not None
    known: list[tuple[Series, float, float, float]] = []
    for series in comparison.series:
        memory = comparison.memory_ratio(series) if relative else series.memory
        if memory and series.score:
            scaled = memory if relative else memory / 2**20
            known.append((series, scaled, series.score.mean, series.score.std or 0.0))
    if not known:
        axes.text(
            0.5,
            0.5,
            f"no {drawn_text(comparison.measure.name)} is known",
            transform=axes.transAxes,
            ha="center",
            color="0.4",
        )
        return
    points = np.array([[x, y] for _, x, y, _ in known])
    spreads = np.array([std for *_, std in known])
    colors = [_color(series.method) for series, *_ in known]
    for (x, y), std, color in zip(points, spreads, colors, strict=True):
        axes.errorbar(x, y, yerr=std or None, fmt="o", color=color, markersize=6, linewidth=1.1, capsize=2.5, zorder=3)
    low, high = points.min(axis=0), points.max(axis=0)
    low[1], high[1] = (points[:, 1] - spreads).min(), (points[:, 1] + spreads).max()
    room = np.maximum(
        0.13 * (high - low), [0.04 * high[0], 0.5 if comparison.measure.percent else 0.04 * np.abs(high[1])]
    )
    axes.set_xlim(max(0.0, low[0] - room[0]), high[0] + room[0])
    axes.set_ylim(low[1] - room[1], high[1] + room[1])
    front = points[pareto_front([(x, comparison.measure.rank(y)) for x, y in points])]
    ends = np.append(front[1:, 0], axes.get_xlim()[1])
    # Each point's score is to be had from its memory on, until the next takes over.
    line = np.column_stack([np.ravel([front[:, 0], ends], order="F"), np.repeat(front[:, 1], 2)])
    axes.plot(*line.T, color="0.72", linewidth=1.6, zorder=1)
    unit = "end-to-end = 1" if relative else "MiB"
    _finish(axes, f"peak memory of a training step ({unit})", drawn_text(comparison.measure.heading))
    label_points(axes, points, spreads, line, [drawn_text(series.short) for series, *_ in known], colors)


def _head_of(measure: Measure) -> str:
    sign = f" ({measure.sign})" if measure.sign else ""
    return f"{drawn_text(measure.name)} of its head{sign}"


def _memory_panel(axes: Axes, comparison: Comparison) -> None:
    known = [series for series in comparison.series if series.memory]
    heights = [(series.memory or 0) / 2**20 for series in known]
    axes.barh(range(len(known)), heights, color=[_color(s.method) for s in known], height=0.62)
    axes.invert_yaxis()
    axes.set_yticks(range(len(known)), [drawn_text(series.short) for series in known])
    for i, (series, height) in enumerate(zip(known, heights, strict=True)):
        ratio = comparison.memory_ratio(series)
        text = f" {height:.0f}" + (f"  ({ratio:.2f})" if ratio else "")
        axes.annotate(text, (height, i), va="center", fontsize=8.5, color="0.25", annotation_clip=False)
    _finish(axes, "MiB" + (" (and against end-to-end)" if comparison.baseline else ""), "")
    axes.grid(visible=False, axis="y")


def _panels(
    comparisons: Sequence[Comparison], title: str, side: float, left: float = 0.68
) -> tuple[Figure, list[Axes]]:
    """A figure with a panel per comparison, `side` and `left` inches beside each, and the methods' colours above."""
    columns = min(len(comparisons), 2)
    rows = -(-len(comparisons) // columns)
    # A Figure of its own, not pyplot's: no global state, no window system.
    width, head, cell = 10.0, 0.7, 4.5 if rows == 1 else 3.9
    height = head + rows * cell
    figure = Figure(figsize=(width, height), dpi=_DPI)
    figure.suptitle(
        drawn_text(title), x=0.02, y=1 - 0.13 / height, ha="left", va="top", fontsize=11.5, fontweight="bold"
    )
    methods = dict.fromkeys(method for comparison in comparisons for method in comparison.methods)
    handles = [
        Line2D([], [], color=_color(m), marker="o", linewidth=1.6, markersize=5, label=drawn_text(m, 40))
        for m in methods
    ]
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.012, 1 - 0.36 / height), ncols=len(handles),
        frameon=False, fontsize=9, handlelength=1.4, columnspacing=1.6,
    )  # fmt: skip
    panels = []
    for i, comparison in enumerate(comparisons):
        row, column = divmod(i, columns)
        x = column * width / columns + left
        y = height - head - (row + 1) * cell + 0.55
        size = (width / columns - left - side, cell - 0.55 - 0.3)
        axes = figure.add_axes((x / width, y / height, size[0] / width, size[1] / height))
        axes.set_title(drawn_text(comparison.name), loc="left", fontsize=9.5)
        panels.append(axes)
    return figure, panels


def _side(comparisons: Sequence[Comparison]) -> float:
    """Inches beside a panel for the names of its lines, at most two fifths of the picture."""
    inches = [
        0.0085 * text_size(len(comparison.series)) * len(s.short)
        for comparison in comparisons
        for s in comparison.series
    ]
    return min(max(inches) + 0.38, 4.0 if len(comparisons) == 1 else 2.3)


def _finish(axes: Axes, across: str, up: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("0.75")
    axes.tick_params(which="both", colors="0.35", labelsize=8.5, length=0)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(across, fontsize=9, color="0.35")
    axes.set_ylabel(up, fontsize=9, color="0.35")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.autoscale_view()  # else the limits, and with them the pixels, are not final


def _color(method: str) -> str:
    # A method of the user's own gets a colour by its name, the same in every picture.
    return _COLORS.get(method) or to_hex(
        colormaps["tab10"]([4, 6, 7, 8, 9][sum(method.encode("utf-8", "surrogatepass")) % 5])
    )


def _shades(drawn: Sequence[Series]) -> list[tuple[float, ...]]:
    """A colour per series: its method's, lighter from one to the next."""
    colors = []
    for series in drawn:
        alike = [s for s in drawn if s.method == series.method]
        light = 0.5 * alike.index(series) / len(alike)
        colors.append(tuple(light + (1 - light) * part for part in to_rgb(_color(series.method))))
    return colors


def _save(figure: Figure, path: Path) -> None:
    with written_aside(path) as aside:
        figure.savefig(aside, format="png")


PICTURES: dict[str, Callable[[Path, Sequence[Comparison], str], bool]] = {
    "pareto.png": draw_pareto,
    "depth.png": draw_depth,
    "curves.png": draw_curves,
}
