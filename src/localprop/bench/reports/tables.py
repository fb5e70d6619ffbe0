"""Tables of a comparison in Markdown: score, memory and time against end-to-end, and score by module."""

from collections.abc import Iterable, Sequence

from localprop.bench.reports.groups import Comparison
from localprop.bench.series import BASELINE, Series, Spread
from localprop.report.texts import markdown

NONE = "-"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A Markdown table. The first `words` columns hold words, aligned left; the others hold numbers, aligned right.

    Cells are Markdown: pass texts from files through `markdown` first.
    """
    lines = [list(heads), [*["---"] * words, *["---:"] * (len(heads) - words)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def comparison_table(comparison: Comparison, chosen: Sequence[Series] | None = None) -> str:
    """A Markdown table of some series of a comparison (default: all); the best of the local ones is bold."""
    chosen, percent = comparison.series if chosen is None else chosen, comparison.measure.percent
    local = [s.rank for s in chosen if s.method != BASELINE and s.score]
    best = max(local) if len(local) > 1 else None
    kinds = {s.measured for s in chosen if s.memory}
    kind = f"{'measured' if kinds == {True} else 'predicted'}, " if len(kinds) == 1 else ""
    rows = []
    for s in chosen:
        score = s.score.text(percent=percent) if s.score else NONE
        bold = s.method != BASELINE and s.score is not None and s.rank == best
        rows.append(
            [
                markdown(s.label),
                str(s.modules),
                f"**{score}**" if bold else score,
                str(len(s.records)),
                "0" if s is comparison.baseline else gap_text(comparison.gap(s), len(s.records), percent),
                _memory(s, mark=len(kinds) > 1),
                ratio_text(comparison.memory_ratio(s)),
                ratio_text(comparison.time_ratio(s)),
            ]
        )
    gap = "gap (points)" if percent else "gap"
    heads = ["setting", "K", markdown(comparison.measure.heading), "seeds", gap, f"peak memory ({kind}MiB)"]
    return table([*heads, "memory ratio", "time ratio"], rows)


def module_table(comparison: Comparison) -> str:
    """A Markdown table of the score of each module's head, the network's own last; a cell is empty of no module."""
    most = max(series.modules for series in comparison.series)
    rows = []
    for series in comparison.series:
        *inner, last = map(comparison.measure.text, series.module_scores)
        rows.append([markdown(series.label), *inner, *[""] * (most - 1 - len(inner)), last])
    return table(["setting", *(str(k) for k in range(1, most)), "network"], rows)


def gap_text(gap: Spread | None, seeds: int, percent: bool = True) -> str:
    """A difference of scores, and of how many seeds where that is not all of them; arguments as of `Spread.text`."""
    if gap is None:
        return NONE
    pairs = "" if gap.count == seeds else f" ({gap.count} of {seeds} seeds)" if gap.count else " (unpaired)"
    return gap.text("+", percent) + pairs


def ratio_text(value: float | None) -> str:
    """A ratio with two digits after the point; a dash for None."""
    return NONE if value is None else f"{value:.2f}"


def _memory(series: Series, mark: bool) -> str:
    if series.memory is None:
        return NONE
    mebibytes = series.memory / 2**20
    return f"{mebibytes:.{0 if mebibytes >= 9.95 else 1}f}" + (" (predicted)" if mark and not series.measured else "")
