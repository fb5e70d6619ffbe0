"""Text beside points and lines that covers neither other text nor points."""

import itertools
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Text

_PIXELS = 8  # from a point to the nearest place of its label
_FAR = 2.2 * _PIXELS  # from here on a line leads from the label to its point
_RINGS = (1.0, 2.0, 3.2, 4.6, 6.4, 8.5, 11.0, 14.0)
_SWEEPS = 6


def text_size(texts: int) -> float:
    """Points, for so many labels in a panel."""
    return 8.5 if texts <= 10 else 7.5


def label_points(
    axes: Axes, points: np.ndarray, spreads: np.ndarray, line: np.ndarray, texts: Sequence[str], colors: Sequence
) -> None:
    """Writes a text beside each point, near it and without overlap; from farther places a thin line leads to it.

    Args:
        axes: with its limits final.
        points: x and y in data units (points, 2).
        spreads: half the height of each point's error bar in data units (points); 0 without one.
        line: corners of a line that is better not written over, in data units (corners, 2).
        texts: one per point.
        colors: one per point.
    """
    size = text_size(len(texts))
    notes = [
        axes.annotate(
            text, point, textcoords="offset pixels", xytext=(0, 0), ha="center", va="center", fontsize=size,
            color=color, arrowprops={"arrowstyle": "-", "linewidth": 0.6, "color": color, "shrinkA": 0, "shrinkB": 3},
            annotation_clip=False,
        )
        for text, point, color in zip(texts, points, colors, strict=True)
    ]  # fmt: skip
    at = axes.transData.transform(points)
    halves = np.array(
        [[Text.get_window_extent(note).width / 2 + 2, 0.6 * size * axes.figure.dpi / 72] for note in notes]
    )
    top = axes.transData.transform(points + np.column_stack([np.zeros(len(points)), spreads]))[:, 1]
    bars = np.concatenate([at + np.array([0, share]) * (top - at[:, 1])[:, None] for share in (-1, -0.5, 0, 0.5, 1)])
    strokes = _strokes(axes.transData.transform(line))
    frame = np.array(axes.bbox.padded(-2).extents)
    places = [_places(centre, half) for centre, half in zip(at, halves, strict=True)]
    chosen = np.array([options[0] for options in places])
    for _ in range(_SWEEPS):
        for i, options in enumerate(places):
            others = np.arange(len(notes)) != i
            costs = _costs(options, at[i], halves[i], chosen[others], halves[others], at[others], bars, strokes, frame)
            chosen[i] = options[np.argmin(costs)]
    for note, centre, half, place in zip(notes, at, halves, chosen, strict=True):
        note.set_position(tuple(place - centre))
        away = np.hypot(*np.maximum(np.abs(place - at) - half, 0).T)
        alone = (away >= 1.5 * np.hypot(*np.maximum(np.abs(place - centre) - half, 0))).sum() >= len(at) - 1
        if alone and away.min() < _FAR and note.arrow_patch is not None:
            note.arrow_patch.set_visible(False)


def _places(centre: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Where the middle of a label can be (places, 2): rings around its point, the nearest first, right before left."""
    angles = np.pi * np.array([0, 8, 4, 12, 2, 14, 6, 10, 1, 15, 7, 9, 3, 13, 5, 11]) / 8
    directions = np.column_stack([np.cos(angles), np.sin(angles)])
    sides = np.where(np.abs(directions) > 0.1, np.sign(directions), 0) * half
    return np.concatenate([centre + sides + ring * _PIXELS * directions for ring in _RINGS])


def _costs(
    places: np.ndarray, own: np.ndarray, half: np.ndarray, others: np.ndarray, other_halves: np.ndarray,
    other_points: np.ndarray, bars: np.ndarray, strokes: np.ndarray, frame: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """How bad each of the places of one label is: text over text is worst, then over points, then far away."""
    apart = np.abs(places[:, None] - others) - half - other_halves
    over_text = (apart < 0).all(axis=2).sum(axis=1)
    over_points = (np.abs(places[:, None] - bars) - half < 2).all(axis=2).sum(axis=1)
    over_line = (np.abs(places[:, None] - strokes) < half).all(axis=2).any(axis=1)
    outside = np.maximum(frame[:2] - (places - half), 0).sum(axis=1)
    outside += np.maximum(places + half - frame[2:], 0).sum(axis=1)
    # A leading line must not run through other labels or points; ten points of it stand for it.
    shares = np.linspace(0.1, 0.9, 10)[:, None]
    line = own + (places[:, None] - own) * shares  # (places, 10, 2)
    crossed = (np.abs(line[:, :, None] - others) < other_halves).all(axis=3).any(axis=1).sum(axis=1)
    hit = (np.hypot(*np.moveaxis(line[:, :, None] - other_points, 3, 0)) < 5).any(axis=1).sum(axis=1)
    # Another's line from its label to its point must not run through this label.
    theirs = other_points + (others - other_points) * shares[:, None]  # (10, others, 2)
    struck = (np.abs(places[:, None, None] - theirs) < half).all(axis=3).any(axis=1).sum(axis=1)
    distance = np.hypot(*np.maximum(np.abs(places - own) - half, 0).T)
    # Of two lines that cross, the eye takes the wrong one.
    tangled = _cross(own, places[:, None], other_points, others).sum(axis=1)
    lines = 300 * (crossed + hit + struck) + 150 * tangled + 25 * over_line
    to_others = np.hypot(*np.moveaxis(np.maximum(np.abs(places[:, None] - other_points) - half, 0), 2, 0))
    doubtful = (to_others < distance[:, None]).any(axis=1)  # nearer to another point than to its own
    return 3000 * over_text + 400 * over_points + 30 * outside + lines + 40 * doubtful + distance


def _cross(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Whether the line from a to b crosses the one from c to d; all (..., 2)."""

    def side(p: np.ndarray, q: np.ndarray, r: np.ndarray) -> np.ndarray:
        left, right = q - p, r - p
        return np.sign(left[..., 0] * right[..., 1] - left[..., 1] * right[..., 0])

    return (side(a, b, c) * side(a, b, d) < 0) & (side(c, d, a) * side(c, d, b) < 0)


def _strokes(corners: np.ndarray) -> np.ndarray:
    """Points along a line through `corners` (corners, 2), a few pixels apart."""
    pieces = [corners[:1]]
    for start, end in itertools.pairwise(corners):
        shares = np.linspace(0, 1, 2 + int(np.hypot(*(end - start)) / 4))[:, None]
        pieces.append(start + (end - start) * shares)
    return np.concatenate(pieces)


def label_ends(axes: Axes, ends: Sequence[tuple[float, float]], texts: Sequence[str], colors: Sequence) -> None:
    """Writes a text at the right side of a panel for each line's end (x, y), without overlap, with a line to it.

    The limits of `axes` have to be final.
    """
    size = text_size(len(texts))
    order = sorted(range(len(ends)), key=lambda i: ends[i][1])
    pixels = axes.transData.transform([ends[i] for i in order])
    line_heights = axes.transAxes.inverted().transform(pixels)[:, 1]
    gap = 1.3 * size * axes.figure.dpi / 72 / axes.bbox.height
    gap = min(gap, 1 / max(len(order) - 1, 1))
    # Halfway between pushing labels up only and down only, which both keep order and gaps; so does clipping.
    gaps = gap * np.arange(len(order))
    up = np.maximum.accumulate(line_heights - gaps)
    down = np.minimum.accumulate((line_heights - gaps)[::-1])[::-1]
    heights = np.clip((up + down) / 2, 0, 1 - gaps[-1]) + gaps
    side = 1 + 0.24 * axes.figure.dpi / axes.bbox.width
    leader = {"arrowstyle": "-", "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 2}
    for i, height in zip(order, heights, strict=True):
        axes.annotate(
            texts[i],
            xy=ends[i],
            xytext=(side, height),
            textcoords="axes fraction",
            va="center",
            fontsize=size,
            color=colors[i],
            annotation_clip=False,
            arrowprops={**leader, "color": colors[i]},
        )
