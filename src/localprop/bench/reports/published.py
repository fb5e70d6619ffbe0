"""Published figures beside a suite's own: gaps to end-to-end training, and which method is the more accurate."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from localprop.bench.reports.groups import Comparison
from localprop.bench.reports.tables import NONE, table
from localprop.bench.reports.ways import Way, own_gap, plain_baseline, way_words, ways_of
from localprop.bench.series import BASELINE, Series, difference, paired
from localprop.report.measures import ACCURACY
from localprop.report.texts import markdown

NOT_RUN = "not run"
REPRODUCED, OPPOSITE, OPEN = "reproduced", "opposite", "open"
_OURS = "feature-reconstruction"
# What the paper compares and what others published, then what there is beyond; methods of a suite's own follow.
_ALWAYS = {
    2: [Way(_OURS, 2), Way("infopro", 2), Way("greedy", 2), Way(_OURS, 2, reach=1)],
    4: [
        Way(_OURS, 4),
        *(Way(_OURS, 4, decoder=name) for name in ("conv", "deconv", "transformer")),
        *(Way(name, 4) for name in ("infopro", "greedy", "trgl", "auglocal")),
        Way(_OURS, 4, reach=1),
        Way(_OURS, 4, reach=1, finish=0.1),
    ],
}


@dataclass(frozen=True)
class Published:
    """Figures of papers, as `published.yaml` has them.

    Attributes:
        network: what they were measured with, in words.
        model: its name in timm.
        modules: K of the accuracies.
        accuracy: dataset to method to test accuracy in percent; a dataset without figures is empty.
        memory: K to method to peak memory, relative to end-to-end training.
        names: dataset to its name in tables.
        sources: sentences.
        unknown: what the sources do not say.
    """

    network: str
    model: str
    modules: int
    accuracy: Mapping[str, Mapping[str, float]]
    memory: Mapping[int, Mapping[str, float]]
    names: Mapping[str, str]
    sources: Sequence[str]
    unknown: Sequence[str]


def published_figures() -> Published:
    """Those that the package carries."""
    text = Path(__file__).parents[1].joinpath("published.yaml").read_text(encoding="utf-8")
    return Published(**yaml.safe_load(text))


def name_of(data: str, published: Published) -> str:
    """A dataset's name in Markdown."""
    return markdown(published.names.get(data, data))


def chosen_comparisons(comparisons: Sequence[Comparison], published: Published) -> dict[str, Comparison]:
    """The comparison of each published dataset that stands for it: of several the one with the longest training.

    Gaps grow with training. Of equally long ones it takes that of the published model, then that of test images, then
    the one with the most settings. Without end-to-end training there is nothing to compare with.
    """
    chosen = {}
    for data in published.accuracy:
        alike = [c for c in comparisons if c.data == data and c.measure == ACCURACY and c.baseline]
        if alike:
            chosen[data] = max(alike, key=lambda c: _weight(c, published))
    return chosen


def images_seen(comparison: Comparison) -> int:
    """How many images a run of a comparison trains on, those of all epochs."""
    record: Any = next(iter(comparison.series[0].records.values()))
    return int(record.result["epochs"] * record.data["train_images"])


def gap_table(chosen: Mapping[str, Comparison], published: Published, modules: int) -> str:
    """A Markdown table of gaps to end-to-end training with `modules` modules: each way as published, and here.

    The first rows have end-to-end training's own accuracy.
    """
    figures = published.accuracy if modules == published.modules else {data: {} for data in published.accuracy}
    ways = list(dict.fromkeys([*_ALWAYS.get(modules, []), *_further(chosen, modules)]))
    rows = []
    for way in [Way(BASELINE, 1), *ways]:
        plain = Way(way.method, way.modules) == way
        theirs = [_published_cell(own, way.method) if plain else "" for own in figures.values()]
        name = way_words(way) + (" (%)" if way.method == BASELINE else "")
        if any(theirs):
            rows.append([name, "published", *(cell or NONE for cell in theirs)])
            name = ""
        rows.append([name, "here", *(_own_cell(chosen.get(data), way) for data in published.accuracy)])
    heads = [f"K={modules}", "", *(name_of(data, published) for data in published.accuracy)]
    return table(heads, rows, words=2)


def orderings(chosen: Mapping[str, Comparison], published: Published) -> dict[tuple[str, str], dict[str, str]]:
    """Which of two methods is the more accurate, as published and here.

    A difference counts if all seeds agree in its sign and it exceeds twice the standard error that comes of the number
    of evaluated images: sqrt((p(1-p) + q(1-q)) / images). Seeds share the images, so more of them do not lessen it.

    Returns:
        For each pair of methods (the one that is better in most published datasets first) the datasets for which both
        are published, with the published difference and, where both were run, the one here and a verdict.
    """
    found: dict[tuple[str, str], dict[str, str]] = {}
    methods = list(dict.fromkeys(method for own in published.accuracy.values() for method in own))
    for one, other in itertools.combinations(methods, 2):
        both = {d: own[one] - own[other] for d, own in published.accuracy.items() if one in own and other in own}
        high, low = (one, other) if sum(map(_sign, both.values())) >= 0 else (other, one)
        turned = 1 if high == one else -1
        found[high, low] = {
            data: _ordering(chosen.get(data), high, low, turned * points, published.modules)
            for data, points in both.items()
        }
    return found


def ordering_lines(chosen: Mapping[str, Comparison], published: Published) -> list[str]:
    """Lines of Markdown: how many orderings reproduced, and a table of all."""
    pairs = orderings(chosen, published)
    cells = [cell for own in pairs.values() for cell in own.values()]
    counts = {word: sum(cell.endswith(word) for cell in cells) for word in (REPRODUCED, OPPOSITE, OPEN, NOT_RUN)}
    shown = [data for data, own in published.accuracy.items() if own]
    rows = [
        [f"{way_words(Way(high, 1))} over {way_words(Way(low, 1))}", *(own.get(data, NONE) for data in shown)]
        for (high, low), own in pairs.items()
    ]
    return [
        f"Of {len(cells)} published orderings: {counts[REPRODUCED]} reproduced, {counts[OPPOSITE]} opposite, "
        f"{counts[OPEN]} open, {counts[NOT_RUN]} not run. One is open if seeds disagree in the sign of the difference, "
        "or if it is below twice the standard error of so many images. Differences in points, as published and here:",
        "",
        table(["which is the more accurate", *(name_of(data, published) for data in shown)], rows),
    ]


def _weight(comparison: Comparison, published: Published) -> tuple[Any, ...]:
    first = comparison.series[0]
    tested = all(record.result.get("evaluated_on") == "test" for record in first.records.values())
    return images_seen(comparison), first.config.get("model") == published.model, tested, len(comparison.series)


def _further(chosen: Mapping[str, Comparison], modules: int) -> list[Way]:
    """Ways of methods that no table has."""
    known = {BASELINE, *(way.method for ways in _ALWAYS.values() for way in ways)}
    found = {way for comparison in chosen.values() for way in ways_of(comparison) if way.modules == modules}
    return sorted((way for way in found if way.method not in known), key=lambda way: way.order)


def _published_cell(figures: Mapping[str, float], method: str) -> str:
    if method not in figures or BASELINE not in figures:
        return ""
    return f"{figures[method]:.2f}" if method == BASELINE else f"{figures[method] - figures[BASELINE]:+.2f}"


def _own_cell(comparison: Comparison | None, way: Way) -> str:
    series = _series(comparison, way)
    if not comparison or not series or not series.score:
        return NOT_RUN
    if way.method == BASELINE:
        return series.score.text()
    gap = own_gap(comparison, series)
    return gap.text("+") if gap else NONE


def _ordering(comparison: Comparison | None, high: str, low: str, points: float, modules: int) -> str:
    one, other = (_series(comparison, Way(method, 1 if method == BASELINE else modules)) for method in (high, low))
    gap = difference(one, other) if one and other else None
    if not one or not other or not gap:
        return f"{points:+.2f}, {NOT_RUN}"
    return f"{points:+.2f}, {gap.mean:+.2f}: {_verdict(one, other, gap.mean, _sign(points))}"


def _series(comparison: Comparison | None, way: Way) -> Series | None:
    if comparison is None:
        return None
    return plain_baseline(comparison) if way.method == BASELINE else ways_of(comparison).get(way)


def _verdict(high: Series, low: Series, gap: float, sign: int) -> str:
    signs = {math.copysign(1, points) for points in paired(high, low)}
    images = min(r.data.get("evaluated_images") or 1 for s in (high, low) for r in s.records.values())
    means = [s.score.mean for s in (high, low) if s.score]
    error = math.sqrt(sum(mean * (100 - mean) for mean in means) / images)
    if len(signs) != 1 or abs(gap) <= 2 * error:
        return OPEN
    return REPRODUCED if gap * sign > 0 else OPPOSITE


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
