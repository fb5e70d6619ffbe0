"""report.md: what a suite of runs gave, against end-to-end training; and how it was measured."""

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from localprop.bench.record import Record, common_settings, read_records
from localprop.bench.reports.groups import Comparison, comparisons_of
from localprop.bench.reports.pictures import MOST_PANELS, PICTURES
from localprop.bench.reports.tables import comparison_table, module_table
from localprop.errors import shortened
from localprop.report.formats import format_duration
from localprop.report.measures import ACCURACY
from localprop.report.texts import code, markdown
from localprop.settings.config import TrainConfig
from localprop.settings.flat import from_flat, to_flags, to_flat
from localprop.system.files import write_text

_NOT_MACHINE = ("commit", "dirty", "date", "versions", "resumed_with")


def write_report(folder: Path) -> list[Path]:
    """Writes report.md and its pictures into a folder of records.

    A picture for which the records have no numbers is not written, and removed where an earlier report left one.

    Returns:
        The paths written, the report first.

    Raises:
        BenchError: the folder is missing or empty, or a file in it is no record.
        CheckpointError: the disk is full, may not be written or fails.
    """
    records = read_records(folder)
    comparisons = comparisons_of(records)
    title = title_of(records)
    written, lines = [folder / "report.md"], [f"# {markdown(title)}", ""]
    for name, draw in PICTURES.items():
        if draw(folder / name, comparisons, title):
            written.append(folder / name)
            lines += [f"![{name.removesuffix('.png')}]({name})", ""]
        else:
            (folder / name).unlink(missing_ok=True)
    if len(written) > 1 and len(comparisons) > MOST_PANELS:
        lines += [
            f"The pictures show the first {MOST_PANELS} of {len(comparisons)} comparisons; the tables have all.",
            "",
        ]
    lines += [*comparison_sections(comparisons), "## How it was measured", "", *how_measured(records)]
    write_text(folder / "report.md", "\n".join(lines) + "\n")
    return written


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
            lines += [f"In all of these runs: {code(shlex.join(_flags(own)))}", ""]
        if notes := _notes(comparison):
            lines += [" ".join(notes), ""]
        if any(score is not None for series in comparison.series for score in series.module_scores):
            sign = f" ({comparison.measure.sign})" if comparison.measure.sign else ""
            name = _capital(markdown(comparison.measure.name))
            lines += [f"{name} of each module's head{sign}:", "", module_table(comparison), ""]
    return lines


def how_measured(records: Sequence[Record]) -> list[str]:
    """Lines of Markdown: what the numbers mean, the settings that all records share, and what they were made on."""
    common, known = common_settings(records), to_flat(TrainConfig())
    flags = _flags(common)
    others = [f", {code(f'{key}={value}')}" for key, value in common.items() if key not in known]
    begun = [record.provenance for record in records]
    provenances = [*begun, *(other for first in begun for other in first.get("resumed_with", []))]
    measured = _capital(" or ".join(dict.fromkeys(markdown(record.measure.name) for record in records)))
    seconds = sum(record.cost.get("seconds") or 0 for record in records)
    return [
        f"{measured} is the network's after the last epoch; no epoch is chosen. ± is the sample standard deviation "
        "over seeds. A gap is the mean difference from end-to-end training with the same seed. Peak memory is that of "
        "one training step: weights, optimizer state, gradients and activations. Ratios are relative to end-to-end "
        "training. Time is that of a step: processor time on a CPU, wall-clock time elsewhere.",
        "",
        f"- in all runs: {code(shlex.join(['localprop', 'train', *flags]))}{''.join(others)}",
        *dict.fromkeys(_data_line(record) for record in records),
        f"- {len(records)} {'runs' if len(records) > 1 else 'run'}, {format_duration(seconds)} in all; at once: "
        f"{_joined(record.cost.get('jobs') for record in records)}",
        f"- commit: {_joined(_commit(provenance) for provenance in provenances)}",
        f"- versions: {_joined(_words(provenance.get('versions')) for provenance in provenances)}",
        f"- machine: {_joined(_machine(provenance) for provenance in provenances)}",
    ]


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _flags(settings: dict[str, Any]) -> list[str]:
    """The flags of `localprop train` for those of the settings that it knows; defaults are left out."""
    known = to_flat(TrainConfig())
    return to_flags(from_flat({key: value for key, value in settings.items() if key in known}, "the records"))


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


def _data_line(record: Record) -> str:
    data = {key: markdown(value) for key, value in record.data.items()}
    part = markdown(record.result.get("evaluated_on"))
    source = " (a folder of images)" if data.get("source") == "folder" else ""
    return (
        f"- {data.get('name')}{source}: {data.get('train_images')} training images, evaluated on "
        f"{data.get('evaluated_images')} {part} images; {data.get('img_size')} px, "
        f"{data.get('classes')} classes"
    )


def _commit(provenance: dict[str, Any]) -> str:
    commit = str(provenance.get("commit") or "unknown")[:10]
    return commit + (" with changes that are not committed" if provenance.get("dirty") else "")


def _machine(provenance: dict[str, Any]) -> str:
    return _words({key: value for key, value in provenance.items() if key not in _NOT_MACHINE})


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items() if item is not None)
    return str(value)


def _joined(values: Iterable[Any]) -> str:
    return "; ".join(dict.fromkeys(markdown(value) for value in values))
