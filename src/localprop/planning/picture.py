"""The picture of a plan: memory over one training step, and memory against time."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from localprop.planning.plans import Plan
from localprop.planning.rows import PlanRow
from localprop.planning.search.proposals import SHORT, Proposed
from localprop.report.formats import format_bytes
from localprop.report.texts import drawn
from localprop.system.files import written_aside

_GREY = "0.62"
_COLORS: dict[Proposed, str] = {"exact": "#3b528b", "frozen": "#21918c", "local": "#e4572e"}


def draw_plan(path: Path, plan: Plan, title: str) -> None:
    """Draws a plan as a PNG of 1400 pixels' width: memory over one training step, and memory against time.

    Above are end-to-end training and the local modules that were chosen, else four or so; below the fastest settings
    for any memory, where the plan has them.
    """
    fronts = bool(plan.exact or plan.local)
    height = 10.0 if fronts else 6.4
    figure = Figure(figsize=(10, height), dpi=140)
    figure.suptitle(drawn(title), x=0.07, y=1 - 0.22 / height, ha="left", fontsize=11, fontweight="bold")
    sides = {"left": 0.07, "right": 0.86}
    steps = figure.add_gridspec(2, 1, **sides, bottom=1 - 5.82 / height, top=1 - 0.9 / height, hspace=0.32)
    above = figure.add_subplot(steps[0])
    below = figure.add_subplot(steps[1], sharex=above, sharey=above)
    row = next((row for row in (plan.choice, plan.local_fit) if row and row.setting.modules > 1), plan.typical)
    _draw_steps(above, below, plan, row)
    if fronts:
        place = figure.add_gridspec(1, 1, **sides, bottom=0.6 / height, top=3.3 / height)
        _draw_fronts(figure.add_subplot(place[0]), plan)
    with written_aside(path) as aside:
        figure.savefig(aside, format="png")


def _draw_steps(above: Axes, below: Axes, plan: Plan, row: PlanRow) -> None:
    """Memory over one training step, end-to-end above another setting."""
    scale, count = plan.baseline.step.seconds, len(row.module_units)
    _draw_step(above, plan.baseline, scale, [_GREY])
    colors = [colormaps["viridis"](x) for x in np.linspace(0.05, 0.9, count)]
    _draw_step(below, row, scale, colors)
    above.set_title("end-to-end: the sum of all activations", loc="left", fontsize=9.5)
    local = count > 1 and not row.setting.recipe.end_to_end
    what = f"{count} local modules: the largest, not the sum" if local else drawn(row.setting.name)
    below.set_title(what, loc="left", fontsize=9.5)
    below.set_xlabel("expected time in a training step (end-to-end = 1)", fontsize=9, color="0.35")
    above.tick_params(labelbottom=False)
    highest = max(plan.baseline.step.peak, row.step.peak) / 2**30
    for axes, own in ((above, plan.baseline), (below, row)):
        axes.set_ylim(0, 1.08 * highest)
        axes.set_xlim(0, max(1.0, row.step.seconds / scale))
        axes.set_ylabel("GiB", fontsize=9, color="0.35")
        _mark_peak(axes, own, f"{format_bytes(own.step.peak)}\n{own.step.peak / plan.baseline.peak:.0%}")


def _draw_fronts(axes: Axes, plan: Plan) -> None:
    """The peak against the time of the fastest settings of each kind, and the budget."""
    axes.set_title("the fastest settings for any memory", loc="left", fontsize=9.5)
    for name, front in plan.fronts.items():
        color, fit = _COLORS[name], plan.fits[name]
        rows = sorted({id(row): row for row in [*front, *([fit] if fit else [])]}.values(), key=lambda row: row.peak)
        times = [plan.time_ratio(row) for row in rows]
        sizes = [row.peak / 2**30 for row in rows]
        axes.plot(times, sizes, color=color, marker="o", markersize=4.5, linewidth=0, label=SHORT[name])
        # A setting with fewer modules may be a little slower than one with more: the line leaves it out.
        line = [i for i in range(len(rows)) if times[i] < min(times[:i], default=float("inf"))]
        axes.plot([times[i] for i in line], [sizes[i] for i in line], color=color, linewidth=1.4)
        for row, time, size in zip(rows, times, sizes, strict=True):
            again = f"ckpt {row.setting.again}" if row.setting.again else row.setting.name
            label = again if row.setting.modules == 1 else f"K={row.setting.modules}"
            axes.annotate(label, (time, size), xytext=(5, 4), textcoords="offset points", fontsize=7.5, color=color)
    if plan.budget is not None:
        axes.axhline(plan.budget / 2**30, color="0.2", linewidth=0.8, linestyle="--")
        axes.annotate(
            f"{format_bytes(plan.budget)}\nbudget", (1.01, plan.budget / 2**30), xycoords=("axes fraction", "data"),
            fontsize=9, fontweight="bold", va="center", annotation_clip=False,
        )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.set_xlabel("expected time of a training step (end-to-end = 1)", fontsize=9, color="0.35")
    axes.set_ylabel("peak, GiB", fontsize=9, color="0.35")
    axes.legend(frameon=False, fontsize=8.5, loc="upper right")
    _quiet(axes)


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
    _quiet(axes)


def _quiet(axes: Axes) -> None:
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
