"""timeline.png: what each process of a parallel run did in a few steps, one lane for each."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from localprop.parallel.timeline.recording import KINDS, WAITING, Lane, Span, Timeline
from localprop.report.texts import drawn
from localprop.system.files import written_aside

STEPS = 10
COLORS = {
    "wait": "0.87",
    "room": "0.87",
    "gradient": "0.87",
    "send": "#00a087",
    "back": "#00a087",
    "load": "#8fc7e8",
    "replicas": "#3c6fb0",
}
COLORS |= {"evaluate": "#c9b458", "save": "0.6"}
_NUMBERED = 0.018  # part of the picture's width; a narrower step has no number
_HEIGHT = 0.62  # of a lane, whose distance is 1
Color = tuple[float, float, float, float]


def module_colors(modules: int) -> list[Color]:
    """A colour for each module, darker with depth; those of curves.png."""
    return [colormaps["magma_r"](depth) for depth in (np.linspace(0.2, 0.9, modules) if modules > 1 else [0.55])]


def draw_timeline(path: Path, timeline: Timeline, title: str) -> None:
    """Draws about ten steps in the middle of the steady ones as a PNG 1400 pixels wide, one lane per process.

    In a process's lane are the modules that it trains, with the step's number (of micro-batches, once for all), and
    when it waits, sends and loads; grey lines lead from what is sent to where it is used. Beside it is the part of its
    time that it waited, over all the steady steps.

    Args:
        path: the picture, replaced if it is there.
        timeline: what was recorded.
        title: what was trained.
    """
    steady = timeline.steady()
    first = steady.start + max(0, len(steady) - STEPS) // 2
    steps = range(first, min(steady.stop, first + STEPS))
    begin, end = _window(timeline, steps)
    lanes = timeline.lanes
    height = 1.55 + 0.55 * len(lanes)
    figure = Figure(figsize=(10, height), dpi=140)
    figure.suptitle(drawn(title), x=0.012, y=1 - 0.14 / height, ha="left", va="top", fontsize=11, fontweight="bold")
    axes = figure.add_axes((0.15, 0.5 / height, 0.76, 0.55 * len(lanes) / height))
    axes.set_xlim(0, 1000 * (end - begin))
    axes.set_ylim(len(lanes) - 0.5, -0.5)
    colors = module_colors(timeline.modules)
    for rank, lane in enumerate(lanes):
        spans = [span for span in lane.spans if span.end > begin and span.begin < end]
        _draw_lane(axes, rank, spans, begin, colors)
        _lead_on(axes, rank, spans, lanes, begin)
    _label(axes, timeline, steady)
    shown = [span.kind for lane in lanes for span in lane.spans if span.end > begin and span.begin < end]
    kinds = [kind for kind in COLORS if kind in shown]
    _legend(figure, colors, kinds, 1 - 0.42 / height)
    with written_aside(path) as aside:
        figure.savefig(aside, format="png")


def _window(timeline: Timeline, steps: range) -> tuple[float, float]:
    """From the beginning to the end of these steps in the last process that did them: the others are ahead of it."""
    for lane in reversed(timeline.lanes):
        if spans := lane.of(steps):
            return min(span.begin for span in spans), max(span.end for span in spans)
    return 0.0, 1.0


def _draw_lane(axes: Axes, rank: int, spans: Sequence[Span], zero: float, colors: list[Color]) -> None:
    width = axes.get_xlim()[1]
    # What lies within something else comes after it, and so on top of it.
    for span in sorted(spans, key=lambda s: s.begin):
        color = colors[span.module] if span.module is not None else COLORS[span.kind]
        left, long = 1000 * (span.begin - zero), 1000 * span.seconds
        # Sending takes no time to speak of; it must be seen all the same.
        tall = _HEIGHT + (0.16 if span.kind == "send" else 0)
        edge = {"edgecolor": color, "linewidth": 1.2} if span.kind == "send" else {"linewidth": 0}
        axes.barh(rank, long, tall, left, color=color, **edge)
    for step, module, middle in _numbered(spans, zero, width):
        dark = sum(colors[module][:3]) < 1.7
        text: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7.5, "color": "white" if dark else "0.15"}
        axes.text(middle, rank, str(step + 1), **text)


def _numbered(spans: Sequence[Span], zero: float, width: float) -> Iterator[tuple[int, int, float]]:
    """(step, module, place in milliseconds) of each number: one where a module computes a step, if that is wide enough.

    Where its micro-batches alternate with other modules', that is each of them.
    """
    computed = sorted((span for span in spans if span.kind == "compute"), key=lambda span: span.begin)
    for (step, module), own in groupby(computed, key=lambda span: (span.step, span.module or 0)):
        stretch = list(own)
        begin, end = (1000 * (moment - zero) for moment in (stretch[0].begin, stretch[-1].end))
        widest = max(stretch, key=lambda span: span.seconds)
        middle = 1000 * (widest.begin + widest.seconds / 2 - zero)
        if end - begin > _NUMBERED * width and 0 < middle < width:
            yield step, module, middle


def _lead_on(axes: Axes, rank: int, spans: Sequence[Span], lanes: Sequence[Lane], zero: float) -> None:
    """Lines from what this process sends to where the next one begins to train on it."""
    if rank + 1 == len(lanes):
        return
    computed = [span for span in lanes[rank + 1].spans if span.kind == "compute"]
    first = min((span.module or 0 for span in computed), default=0)
    # Of a step's micro-batches, the n-th that is sent is the n-th that the next process's first module trains on.
    used = dict(_counted(span for span in computed if span.module == first))
    for place, span in _counted(span for span in lanes[rank].spans if span.kind == "send"):
        if span in spans and place in used:
            x = [1000 * (span.end - zero), 1000 * (used[place].begin - zero)]
            y = [rank + _HEIGHT / 2, rank + 1 - _HEIGHT / 2]
            axes.plot(x, y, color="0.6", linewidth=0.7, clip_on=True)


def _counted(spans: Iterable[Span]) -> Iterator[tuple[tuple[int, int], Span]]:
    """Each span with its place: the step, and which of the step's it is."""
    seen: Counter[int] = Counter()
    for span in spans:
        yield (span.step, seen[span.step]), span
        seen[span.step] += 1


def _label(axes: Axes, timeline: Timeline, steady: range) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("0.75")
    axes.tick_params(colors="0.35", labelsize=8.5, length=0)
    axes.set_xlabel("milliseconds", fontsize=9, color="0.35")
    names = [drawn(lane.name.partition(":")[0]).replace(", replica", "\nreplica") for lane in timeline.lanes]
    axes.set_yticks(
        range(len(names)),
        [f"rank {rank}\n{name}" for rank, name in enumerate(names)],
    )
    # The row's name stands where no lane is.
    place: dict[str, Any] = {
        "xycoords": ("axes fraction", "data"),
        "fontsize": 8.5,
        "color": "0.35",
        "annotation_clip": False,
    }
    axes.annotate(f"waiting, of\n{len(steady)} steps", (1.012, -0.62), va="bottom", **place | {"fontsize": 7.5})
    for rank, part in enumerate(timeline.waiting(steady)):
        axes.annotate(f"{part:.1%}", (1.012, rank), va="center", **place)


def _legend(figure: Figure, colors: list[Color], kinds: Sequence[str], y: float) -> None:
    modules = len(colors)
    named = [k for k in range(modules) if modules <= 6 or k in (0, modules - 1)]
    patches = [Patch(color=colors[k], label=f"module {k + 1}") for k in named]
    # Both kinds of waiting look alike.
    names = {COLORS[kind]: "waits" if kind in WAITING else KINDS[kind] for kind in kinds}
    patches += [Patch(color=color, label=name) for color, name in names.items()]
    style: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0.005, y), "ncols": len(patches), "frameon": False}
    figure.legend(handles=patches, fontsize=8.5, labelcolor="0.25", handlelength=1.1, columnspacing=1.3, **style)
