"""How the numbers of a report were measured: protocol, data, commits, versions and machines, from the records."""

import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from localprop.bench.record import Record, common_settings
from localprop.report.formats import format_duration
from localprop.report.texts import code, markdown
from localprop.settings.config import TrainConfig
from localprop.settings.flat import from_flat, to_flags, to_flat

_NOT_MACHINE = ("commit", "dirty", "date", "versions", "resumed_with")


def how_measured(records: Sequence[Record]) -> list[str]:
    """Lines of Markdown: what the numbers mean, the settings that all records share, and what they were made on."""
    common, known = common_settings(records), to_flat(TrainConfig())
    flags = flags_of(common)
    others = [f", {code(f'{key}={value}')}" for key, value in common.items() if key not in known]
    begun = [record.provenance for record in records]
    provenances = [*begun, *(other for first in begun for other in first.get("resumed_with", []))]
    measured = capital(" or ".join(dict.fromkeys(markdown(record.measure.name) for record in records)))
    seconds = sum(record.cost.get("seconds") or 0 for record in records)
    return [
        f"{measured} is the network's after the last epoch; no epoch is chosen. ± is the sample standard deviation "
        "over seeds. A gap is the mean difference from end-to-end training with the same seed. Peak memory is that of "
        "one training step: weights, optimizer state, gradients and activations. Ratios are relative to end-to-end "
        "training. Time is that of a step: processor time on a CPU, wall-clock time elsewhere.",
        "",
        f"- in all runs: {code(shlex.join(['localprop', 'train', *flags]))}{''.join(others)}",
        *dict.fromkeys(_data_line(record) for record in records),
        f"- {_count(records)}, {format_duration(seconds)} in all; at once: "
        f"{_joined(record.cost.get('jobs') for record in records)}",
        f"- commit: {_joined(_commit(provenance) for provenance in provenances)}",
        f"- versions: {_joined(_words(provenance.get('versions')) for provenance in provenances)}",
        f"- machine: {_joined(_machine(provenance) for provenance in provenances)}",
    ]


def suite_lines(link: str, records: Sequence[Record]) -> list[str]:
    """Lines of Markdown: an item for a folder of records, with who made them when and on what.

    Args:
        link: to the folder.
        records: one or more.
    """
    begun = [record.provenance for record in records]
    seconds = sum(record.cost.get("seconds") or 0 for record in records)
    return [
        f"- [{_joined(record.suite for record in records)}]({link}): "
        f"{_count(records)}, {format_duration(seconds)} in all; "
        f"commit {_joined(_commit(provenance) for provenance in begun)}; "
        f"{_joined(_words(provenance.get('versions')) for provenance in begun)}; "
        f"{_joined(_machine(provenance) for provenance in begun)}."
    ]


def _count(records: Sequence[Record]) -> str:
    return f"{len(records)} {'runs' if len(records) > 1 else 'run'}"


def flags_of(settings: dict[str, Any]) -> list[str]:
    """The flags of `localprop train` for those of the settings that it knows; defaults are left out."""
    known = to_flat(TrainConfig())
    return to_flags(from_flat({key: value for key, value in settings.items() if key in known}, "the records"))


def capital(words: str) -> str:
    return words[:1].upper() + words[1:]


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
