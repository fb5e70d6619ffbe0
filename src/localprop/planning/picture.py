"""The picture of a plan: memory over one training step."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from localprop.planning.plans import Plan
from localprop.planning.rows import PlanRow
from localprop.report.formats import format_bytes
from localprop.report.texts import drawn
from localprop.system.files import written_aside

_GREY = "0.62"


def draw_plan(path: Path, plan: Plan, row: PlanRow, title: str) -> None:
    """Draws memory over one training step, end-to-end above `row`'s local modules, as a PNG of 1400 x 900 pixels."""
    figure = Figure(figsize=(10, 6.4), dpi=140)
    figure.suptitle(drawn(title), x=0.07, y=0.965, ha="left", fontsize=11, fontweight="bold")
    grid = {"left": 0.07, "right": 0.86, "bottom": 0.09, "top": 0.86, "hspace": 0.32}
    above, below = figure.subplots(2, 1, sharex=True, sharey=True, gridspec_kw=grid)
    scale = plan.baseline.step.seconds
    _draw_step(above, plan.baseline, scale, [_GREY])
    count = len(row.module_units)
    colors = [colormaps["viridis"](x) for x in np.linspace(0.05, 0.9, count)]
    _draw_step(below, row, scale, colors)
    above.set_title("end-to-end: the sum of all activations", loc="left", fontsize=9.5)
    what = f"{count} local modules: the largest, not the sum"
    if count == 1 or row.setting.recipe.end_to_end:
        what = drawn(row.setting.name)
    below.set_title(what, loc="left", fontsize=9.5)
    below.set_xlabel("expected time in a training step (end-to-end = 1)", fontsize=9, color="0.35")
    highest = max(plan.baseline.step.peak, row.step.peak) / 2**30
    for axes, own in ((above, plan.baseline), (below, row)):
        axes.set_ylim(0, 1.08 * highest)
        axes.set_xlim(0, max(1.0, row.step.seconds / scale))
        axes.set_ylabel("GiB", fontsize=9, color="0.35")
        _mark_peak(axes, own, f"{format_bytes(own.step.peak)}\n{plan.memory_ratio(own):.0%}")
    with written_aside(path) as aside:
        figure.savefig(aside, format="png")


def _draw_step(axes: Axes, row: PlanRow, scale: float, colors: Sequence) -> None:
    """Fills the memory in use over time, each module's share of the step in its colour."""
    seconds, used = np.array(row.step.timeline).T
    axes.fill_between(seconds / scale, used / 2**30, step="post", color="0.85", linewidth=0)
    start = 0.0
    for k, end in zip(row.step.module_turns, row.step.module_ends, strict=True):
        color = colors[k]
        inside = (seconds >= start) & (seconds <= end)
        axes.fill_between(seconds[inside] / scale, used[inside] / 2**30, step="post", color=color, linewidth=0)
        if len(colors) > 1 and len(row.step.module_ends) <= 12:
            axes.annotate(
                str(k + 1), ((start + end) / 2 / scale, 0.02), xycoords=("data", "axes fraction"),
                ha="center", va="bottom", fontsize=8, color="white", fontweight="bold",
            )  # fmt: skip
        start = end
    static = sum(row.step.parts[part] for part in ("parameters", "optimizer")) / 2**30
    axes.axhline(static, color="black", linewidth=0.8, linestyle=":")
    axes.annotate(
        "weights and\noptimizer", (1.01, static), xycoords=("axes fraction", "data"),
        fontsize=7.5, color="0.35", va="center", annotation_clip=False,
    )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("0.75")
    axes.tick_params(which="both", colors="0.35", labelsize=8.5, length=0)


def _mark_peak(axes: Axes, row: PlanRow, text: str) -> None:
    height = row.step.peak / 2**30
    axes.axhline(height, color="0.2", linewidth=0.8, linestyle="--")
    axes.annotate(
        text, (1.01, height), xycoords=("axes fraction", "data"), va="center",
        fontsize=9, fontweight="bold", annotation_clip=False,
    )  # fmt: skip
