"""Compares published figures with a suite's own."""

import itertools
import math
from collections.abc import Mapping, Sequence

from localprop.bench.record import Record
from localprop.bench.reports.groups import Comparison, comparisons_of
from localprop.bench.reports.tables import NONE, gap_text, ratio_text, table, typical
from localprop.bench.series import BASELINE, Series, difference, paired
from localprop.report.measures import ACCURACY
from localprop.report.texts import markdown

# Dataset to method to test accuracy in percent; None where none was published.
Figures = Mapping[str, Mapping[str, float | None]]
REPRODUCED, OPPOSITE, OPEN = "reproduced", "opposite", "open"


def paper_comparison(records: Sequence[Record], published: Figures, modules: int = 4) -> str:
    """A Markdown table of accuracies and gaps to end-to-end training: as published, and here.

    Args:
        records: one or more. Of several series with one method, the one nearest to the defaults counts.
        published: the figures of local methods with `modules` modules, and of "end-to-end".
        modules: K of the published figures, and of those here.
    """
    comparisons, rows = comparisons_of(records), []
    for data, figures in published.items():
        comparison = _comparison_of(comparisons, data)
        for method, figure in figures.items():
            theirs = [NONE if figure is None else f"{figure:.2f}", _published_gap(figures, method)]
            rows.append([markdown(data), markdown(method), *theirs, *_ours(comparison, method, modules)])
    return table(["data", "method", "published (%)", "gap", "here (%)", "gap", "seeds"], rows, words=2)


def orderings(records: Sequence[Record], published: Figures, modules: int = 4) -> list[tuple[str, ...]]:
    """Which of two methods is the more accurate: as published, and here; for all pairs that both have.

    A difference counts if all seeds agree in its sign and it exceeds twice the standard error that comes of the number
    of evaluated images: sqrt((p(1-p) + q(1-q)) / images). Seeds share the images, so more of them do not lessen it.

    Args as those of `paper_comparison`.

    Returns:
        For each pair the data, the two methods (the one with the better published figure first), the published
        difference and the one here in points, seeds, and `REPRODUCED`, `OPPOSITE` or `OPEN` (it does not count).
    """
    comparisons = comparisons_of(records)
    rows: list[tuple[str, ...]] = []
    for data, figures in published.items():
        comparison = _comparison_of(comparisons, data)
        known = [(method, figure) for method, figure in figures.items() if figure is not None]
        for (low, lower), (high, higher) in itertools.combinations(sorted(known, key=lambda item: item[1]), 2):
            one, other = _series(comparison, high, modules), _series(comparison, low, modules)
            gap = difference(one, other) if one and other else None
            if one and other and gap:
                seeds, verdict = str(gap.count) if gap.count else "unpaired", _verdict(one, other, gap.mean)
                rows.append(
                    (
                        markdown(data),
                        f"{markdown(high)} over {markdown(low)}",
                        f"{higher - lower:+.2f}",
                        gap.text("+"),
                        seeds,
                        verdict,
                    )
                )
    return rows


def memory_comparison(records: Sequence[Record], published: Mapping[int, Mapping[str, float]]) -> str:
    """A Markdown table of peak memory against end-to-end's: as published, and ours of the first comparison that has it.

    Args:
        records: one or more.
        published: K to method to ratio.
    """
    rows = []
    for modules, figures in published.items():
        for method, figure in figures.items():
            found = ((comparison, typical(comparison, method, modules)) for comparison in comparisons_of(records))
            ratios = (comparison.memory_ratio(series) for comparison, series in found if series)
            ours = next((ratio for ratio in ratios if ratio), None)
            rows.append([markdown(method), str(modules), f"{figure:.2f}", ratio_text(ours) if ours else "not run"])
    return table(["method", "K", "published", "here"], rows)


def _verdict(high: Series, low: Series, gap: float) -> str:
    signs = {math.copysign(1, points) for points in paired(high, low)}
    images = min(r.data.get("evaluated_images") or 1 for s in (high, low) for r in s.records.values())
    means = [s.score.mean for s in (high, low) if s.score]
    error = math.sqrt(sum(mean * (100 - mean) for mean in means) / images)
    if len(signs) != 1 or abs(gap) <= 2 * error:
        return OPEN
    return REPRODUCED if gap > 0 else OPPOSITE


def _comparison_of(comparisons: Sequence[Comparison], data: str) -> Comparison | None:
    """The comparison of a dataset. Of several it prefers one with a baseline, then the one with the most series."""
    alike = [comparison for comparison in comparisons if comparison.data == data and comparison.measure == ACCURACY]
    return max(alike, key=lambda comparison: (comparison.baseline is not None, len(comparison.series)), default=None)


def _series(comparison: Comparison | None, method: str, modules: int) -> Series | None:
    if comparison is None:
        return None
    return comparison.baseline if method == BASELINE else typical(comparison, method, modules)


def _ours(comparison: Comparison | None, method: str, modules: int) -> list[str]:
    series = _series(comparison, method, modules)
    if comparison is None or series is None or series.score is None:
        return ["not run", NONE, NONE]
    seeds = len(series.records)
    gap = "0" if series is comparison.baseline else gap_text(comparison.gap(series), seeds)
    return [series.score.text(), gap, str(seeds)]


def _published_gap(figures: Mapping[str, float | None], method: str) -> str:
    own, baseline = figures[method], figures.get(BASELINE)
    if own is None or baseline is None:
        return NONE
    return "0" if method == BASELINE else f"{own - baseline:+.2f}"
