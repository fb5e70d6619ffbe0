"""A suite's report: what its runs gave against end-to-end training, or beside published figures; and its pictures."""

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from localprop.bench.record import Record, common_settings, read_records
from localprop.bench.reports.gap import draw_front
from localprop.bench.reports.groups import Comparison, comparisons_of
from localprop.bench.reports.measured import capital, flags_of, how_measured
from localprop.bench.reports.page import by_module, page_lines
from localprop.bench.reports.pictures import MOST_PANELS, PICTURES, draw_depth
from localprop.bench.reports.published import chosen_comparisons, published_figures
from localprop.bench.reports.tables import comparison_table, module_table
from localprop.errors import BenchError, shortened
from localprop.report.measures import ACCURACY
from localprop.report.texts import code, markdown
from localprop.system.commands import command
from localprop.system.files import write_text


def write_report(*folders: Path, output: Path | None = None, published: bool = False, note: str = "") -> list[Path]:
    """Writes a page about folders of records, and its pictures beside it.

    A picture for which the records have no numbers is not written, and removed where an earlier report left one.

    Args:
        folders: of records; one or more.
        output: the page, NAME.md; its pictures are NAME-*.png. Default: report.md and its pictures in the one folder.
        published: whether the page puts them beside published figures.
        note: a sentence about the data for that page.

    Returns:
        The paths written, the page first.

    Raises:
        BenchError: a folder is missing or empty, a file in it is no record, there is no place for the page, or no use
            for the note.
        CheckpointError: the disk is full, may not be written or fails.
    """
    page = _place(folders, output)
    if note and not published:
        raise BenchError("--note is a sentence for a page with published figures; add --published")
    suites = {folder: read_records(folder) for folder in folders}
    records = [record for own in suites.values() for record in own]
    comparisons = comparisons_of(records)
    prefix = f"{page.stem}-" if output else ""
    if not published:
        title = title_of(records)
        drawn = _draw(page, prefix, {name: _about(draw, comparisons, title) for name, draw in PICTURES.items()})
        lines = _report(records, comparisons, [path.name for path in drawn], prefix)
    else:
        figures = published_figures()
        chosen = chosen_comparisons(comparisons, figures)
        depth = _about(draw_depth, by_module(chosen, figures), "K=4")
        drawn = _draw(page, prefix, {"front.png": lambda path: draw_front(path, chosen), "depth.png": depth})
        pictures = {path.stem.removeprefix(prefix): path.name for path in drawn}
        linked = {os.path.relpath(folder, page.parent): own for folder, own in suites.items()}
        lines = page_lines(linked, comparisons, figures, pictures, _command(folders, output, note), note)
    write_text(page, "\n".join(lines) + "\n")
    return [page, *drawn]


def _place(folders: Sequence[Path], output: Path | None) -> Path:
    if output is None and len(folders) > 1:
        raise BenchError("several folders make a page of their own; name it with --output NAME.md")
    if output and output.suffix != ".md":
        raise BenchError(f"--output {output} is no page of Markdown; name it NAME.md")
    return output or folders[0] / "report.md"


def _draw(page: Path, prefix: str, pictures: Mapping[str, Callable[[Path], bool]]) -> list[Path]:
    drawn = []
    for name, draw in pictures.items():
        path = page.with_name(prefix + name)
        if draw(path):
            drawn.append(path)
        else:
            path.unlink(missing_ok=True)
    return drawn


def _about(
    draw: Callable[[Path, Sequence[Comparison], str], bool], comparisons: Sequence[Comparison], title: str
) -> Callable[[Path], bool]:
    return lambda path: draw(path, comparisons, title)


def _command(folders: Sequence[Path], output: Path | None, note: str) -> str:
    words: list[str | Path] = [*folders, "--published"]
    words += ["--output", output] if output else []
    words += ["--note", note] if note else []
    return command("bench", "report", *words)


def _report(
    records: Sequence[Record], comparisons: Sequence[Comparison], pictures: Sequence[str], prefix: str
) -> list[str]:
    lines = [f"# {markdown(title_of(records))}", ""]
    for name in pictures:
        lines += [f"![{name.removeprefix(prefix).removesuffix('.png')}]({name})", ""]
    if pictures and len(comparisons) > MOST_PANELS:
        lines += [
            f"The pictures show the first {MOST_PANELS} of {len(comparisons)} comparisons; the tables have all.",
            "",
        ]
    return [*lines, *comparison_sections(comparisons), "## How it was measured", "", *how_measured(records)]


def title_of(records: Sequence[Record]) -> str:
    """The names of the suites that the records are of, in one line."""
    return shortened(", ".join(dict.fromkeys(str(record.suite) for record in records)), 120)


def comparison_sections(comparisons: Sequence[Comparison]) -> list[str]:
    """Lines of Markdown: a section (`##`) per comparison with its two tables."""
    lines = []
    shared = common_settings(
        [record for comparison in comparisons for s in comparison.series for record in s.records.values()]
    )
    for comparison in comparisons:
        lines += [f"## {markdown(comparison.name)}", "", comparison_table(comparison), ""]
        records = [record for s in comparison.series for record in s.records.values()]
        own = {key: value for key, value in common_settings(records).items() if key not in shared}
        if own:
            lines += [f"In all of these runs: {code(shlex.join(flags_of(own)))}", ""]
        if notes := _notes(comparison):
            lines += [" ".join(notes), ""]
        if any(score is not None for series in comparison.series for score in series.module_scores):
            sign = f" ({comparison.measure.sign})" if comparison.measure.sign else ""
            name = capital(markdown(comparison.measure.name))
            lines += [f"{name} of each module's head{sign}:", "", module_table(comparison), ""]
    return lines


def _notes(comparison: Comparison) -> list[str]:
    notes = []
    if comparison.baseline is None:
        notes.append("There is no end-to-end run to compare with.")
    elif sum(s.undivided for s in comparison.series) > 1:
        notes.append("Gaps and ratios are to the first row's.")
    records = [record for s in comparison.series for record in s.records.values()]
    for what, where in (("cpu", "provenance"), ("gpu", "provenance"), ("jobs", "cost")):
        if len({getattr(record, where).get(what) for record in records}) > 1:
            notes.append(f"Not all runs have the same {what}: do not compare times, nor memory on different devices.")
    if any(s.score and len(s.scores) < len(s.records) for s in comparison.series):
        what = "an accuracy" if comparison.measure == ACCURACY else "a score"
        notes.append(f"Runs without {what} count among the seeds, but not in the means.")
    return notes
