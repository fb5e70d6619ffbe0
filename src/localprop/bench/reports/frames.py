"""What the pictures of a report share: a panel for each comparison, colours of methods, and points with names."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from localprop.bench.reports.groups import Comparison
from localprop.bench.reports.placing import label_points
from localprop.bench.series import BASELINE
from localprop.report.texts import drawn as drawn_text
from localprop.system.files import written_aside

_COLORS = {
    BASELINE: "#222222", "feature-reconstruction": "#1f6fb4", "infopro": "#d1690b", "greedy": "#2b8a4a",
}  # fmt: skip
_DPI = 140


@dataclass(frozen=True)
class Point:
    """A series in a picture: its name and method, its place, and half the height of its error bar (0 without one)."""

    name: str
    method: str
    x: float
    y: float
    std: float


def draw_points(axes: Axes, known: Sequence[Point], least: float) -> tuple[np.ndarray, np.ndarray]:
    """Draws points with error bars, and sets the limits of the panel around them.

    Args:
        axes: the panel.
        known: one or more points.
        least: room above and below that is always left, in units of y.

    Returns:
        Places (points, 2) and heights of the error bars (points), for `name_points`.
    """
    points, spreads = np.array([[p.x, p.y] for p in known]), np.array([p.std for p in known])
    for p in known:
        color = color_of(p.method)
        axes.errorbar(
            p.x, p.y, yerr=p.std or None, fmt="o", color=color, markersize=6, linewidth=1.1, capsize=2.5, zorder=3
        )
    low, high = points.min(axis=0), points.max(axis=0)
    low[1], high[1] = (points[:, 1] - spreads).min(), (points[:, 1] + spreads).max()
    room = np.maximum(0.13 * (high - low), [0.04 * high[0], least])
    axes.set_xlim(max(0.0, low[0] - room[0]), high[0] + room[0])
    axes.set_ylim(low[1] - room[1], high[1] + room[1])
    return points, spreads


def name_points(axes: Axes, known: Sequence[Point], points: np.ndarray, spreads: np.ndarray, line: np.ndarray) -> None:
    """Writes its name beside each point; not over `line` (corners, 2), if there is room."""
    colors = [color_of(p.method) for p in known]
    label_points(axes, points, spreads, line, [drawn_text(p.name) for p in known], colors)


def panels_of(
    comparisons: Sequence[Comparison], title: str, side: float, left: float = 0.68
) -> tuple[Figure, list[Axes]]:
    """A figure with a panel per comparison, `side` and `left` inches beside each, and the methods' colours above."""
    methods = dict.fromkeys(method for comparison in comparisons for method in comparison.methods)
    return panels([comparison.name for comparison in comparisons], list(methods), title, side, left)


def panels(
    names: Sequence[str], methods: Sequence[str], title: str, side: float, left: float = 0.68
) -> tuple[Figure, list[Axes]]:
    """The same with a panel per name, and the colours of some methods."""
    columns = min(len(names), 2)
    rows = -(-len(names) // columns)
    # A Figure of its own, not pyplot's: no global state, no window system.
    width, head, cell = 10.0, 0.7, 4.5 if rows == 1 else 3.9
    height = head + rows * cell
    figure = Figure(figsize=(width, height), dpi=_DPI)
    figure.suptitle(
        drawn_text(title), x=0.02, y=1 - 0.13 / height, ha="left", va="top", fontsize=11.5, fontweight="bold"
    )
    handles = [
        Line2D([], [], color=color_of(m), marker="o", linewidth=1.6, markersize=5, label=drawn_text(m, 40))
        for m in methods
    ]
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.012, 1 - 0.36 / height), ncols=len(handles),
        frameon=False, fontsize=9, handlelength=1.4, columnspacing=1.6,
    )  # fmt: skip
    found = []
    for i, name in enumerate(names):
        row, column = divmod(i, columns)
        x = column * width / columns + left
        y = height - head - (row + 1) * cell + 0.55
        size = (width / columns - left - side, cell - 0.55 - 0.3)
        axes = figure.add_axes((x / width, y / height, size[0] / width, size[1] / height))
        axes.set_title(drawn_text(name), loc="left", fontsize=9.5)
        found.append(axes)
    return figure, found


def finish(axes: Axes, across: str, up: str) -> None:
    """Names the axes of a panel, and makes its limits final."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("0.75")
    axes.tick_params(which="both", colors="0.35", labelsize=8.5, length=0)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(across, fontsize=9, color="0.35")
    axes.set_ylabel(up, fontsize=9, color="0.35")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.autoscale_view()  # else the limits, and with them the pixels, are not final


def color_of(method: str) -> str:
    """The colour of a method, the same in every picture."""
    # A method of the user's own gets one by its name.
    return _COLORS.get(method) or to_hex(
        colormaps["tab10"]([4, 6, 7, 8, 9][sum(method.encode("utf-8", "surrogatepass")) % 5])
    )


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG, whole or not at all."""
    with written_aside(path) as aside:
        figure.savefig(aside, format="png")
