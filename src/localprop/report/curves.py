"""curves.png: loss and score of every module over epochs."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from localprop.report.formats import format_loss
from localprop.report.results import EpochRow
from localprop.report.texts import drawn
from localprop.system.files import written_aside

# With more labels than this, leader lines would cross them; the colour leads to the line as well.
MOST_LEADERS = 8
# As many labels as fit beside a panel; of more modules only the first and the last are named.
MOST_LABELS = 16
FIGURE_SPACE = "\u2007"  # as wide as a digit


def draw_curves(
    path: Path, rows: Sequence[EpochRow], title: str, evaluated_on: str = "test", steps_per_epoch: int | None = None
) -> None:
    """Draws loss (left) and the headline score (right) of every module over epochs, as a PNG of 1400 x 560 pixels.

    Args:
        path: the picture, replaced if it is there.
        rows: one or more epochs.
        title: what was trained, such as "infopro, vit_tiny"; number of modules and score are added.
        evaluated_on: "test" or "validation" images.
        steps_per_epoch: where it is given, an epoch that was cut short is drawn as the part of an epoch that it is.
    """
    modules, headline = len(rows[0].train_losses), rows[0].measures[0]
    counted = f", {modules} modules" if modules > 1 else ""
    # A Figure of its own, not pyplot's: no global state, no window system.
    figure = Figure(figsize=(10, 4), dpi=140)
    figure.suptitle(
        f"{drawn(title)}{counted}: {headline.text(rows[-1].headline)}{headline.sign} {evaluated_on} {headline.name}",
        x=0.047, y=0.965, ha="left", fontsize=11, fontweight="bold",
    )  # fmt: skip
    grid = {"left": 0.047, "right": 0.91, "bottom": 0.125, "top": 0.82, "wspace": 0.31}
    left, right = figure.subplots(1, 2, gridspec_kw=grid)
    left.set_title("training loss", loc="left", fontsize=9.5)
    unit = f" ({headline.sign})" if headline.sign else ""
    right.set_title(f"{evaluated_on} {headline.name}{unit}", loc="left", fontsize=9.5)
    losses = np.array([row.train_losses for row in rows], dtype=float).T
    scores = np.array([row.heads for row in rows], dtype=float).T
    if np.nanmin(losses) > 0 and np.nanmax(losses) > 50 * np.nanmin(losses):
        left.set_yscale("log")
    epochs = np.array([row.step / steps_per_epoch if steps_per_epoch else row.epoch for row in rows])
    _draw_panel(left, epochs, losses, format_loss)
    _mark_finish(left, epochs, losses)
    # Not every epoch is evaluated, and the network's score is there whenever one was.
    evaluated = np.isfinite(scores[-1])
    if evaluated.any():
        _draw_panel(right, epochs[evaluated], scores[:, evaluated], headline.text)
    with written_aside(path) as aside:
        figure.savefig(aside, format="png")


def _mark_finish(axes: Axes, epochs: np.ndarray, losses: np.ndarray) -> None:
    """Marks where modules before the last have lost their losses, to be trained exactly."""
    exact = np.isnan(losses[0])
    if exact.any() and not exact.all() and not np.isnan(losses[-1]).any():
        start = epochs[~exact][-1]
        axes.axvline(start, color="0.6", linewidth=0.8, linestyle=":")
        axes.annotate(
            "exact", (start, 1.0), xycoords=("data", "axes fraction"), xytext=(2, 0), textcoords="offset points",
            fontsize=7.5, color="0.5", va="bottom",
        )  # fmt: skip


def _draw_panel(axes: Axes, epochs: np.ndarray, values: np.ndarray, text: Callable[[float], str]) -> None:
    """Draws `values` (modules, epochs), darker with depth; a module without a number (NaN) has no line."""
    modules = len(values)
    depths = np.linspace(0.2, 0.9, modules) if modules > 1 else [0.9]
    colors = [colormaps["magma_r"](depth) for depth in depths]
    marker = "o" if len(epochs) == 1 else None
    for k, color in enumerate(colors):
        width = 2.4 if k == modules - 1 else 1.3
        axes.plot(epochs, values[k], color=color, linewidth=width, marker=marker, clip_on=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("0.75")
    axes.tick_params(which="both", colors="0.35", labelsize=8.5, length=0)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_xlabel("epoch", fontsize=9, color="0.35")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.set_xlim(0, epochs[-1] * 1.01)
    named = [k for k in range(modules) if modules <= MOST_LABELS or k in (0, modules - 1)]
    named = [k for k in named if math.isfinite(values[k, -1])]
    if named:
        _label_ends(axes, epochs[-1], {k: values[k, -1] for k in named}, colors, text)


def _label_ends(axes: Axes, epoch: float, ends: dict[int, float], colors: list, text: Callable[[float], str]) -> None:
    """Writes number and last value of modules beside the ends of their lines, without overlap."""
    modules = len(colors)
    order = sorted(ends, key=lambda k: ends[k])
    axes.autoscale_view()  # else the limits, and with them the pixels, are not final
    pixels = axes.transData.transform([(epoch, ends[k]) for k in order])
    line_heights = axes.transAxes.inverted().transform(pixels)[:, 1]
    size = 8.5 if modules < 10 else 7.5
    gap = 1.3 * size * axes.figure.dpi / 72 / axes.bbox.height
    # Halfway between pushing labels up only and down only, which both keep order and gaps; so does clipping.
    gaps = gap * np.arange(len(order))
    up = np.maximum.accumulate(line_heights - gaps)
    down = np.minimum.accumulate((line_heights - gaps)[::-1])[::-1]
    heights = np.clip((up + down) / 2, 0, 1 - gaps[-1]) + gaps
    leader = {"arrowstyle": "-", "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 3}
    for k, height in zip(order, heights, strict=True):
        number = str(k + 1).rjust(len(str(modules)), FIGURE_SPACE) + "  " if modules > 1 else ""
        axes.annotate(
            number + text(ends[k]),
            xy=(epoch, ends[k]),
            xytext=(1.045, height),
            textcoords="axes fraction",
            va="center",
            fontsize=size,
            fontweight="bold" if k == modules - 1 else "normal",
            color=colors[k],
            annotation_clip=False,
            arrowprops={**leader, "color": colors[k]} if len(order) <= MOST_LEADERS else None,
        )
    if modules > 1:
        axes.annotate("module", (1.045, 1.045), xycoords="axes fraction", fontsize=7.5, color="0.5")
