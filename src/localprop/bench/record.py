"""What is known of one finished run of a suite: one JSON file, and the only thing that reports are made from."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from localprop.errors import BenchError, ConfigError
from localprop.report.measures import ACCURACY, MEASURE, Measure
from localprop.settings.config import TrainConfig
from localprop.settings.earlier import settings_as_recorded
from localprop.settings.flat import free, from_flat, to_flat
from localprop.system.commands import command
from localprop.system.files import write_text
from localprop.system.reading import (
    AMOUNT,
    COUNT,
    FLAG,
    MAPPING,
    NULL,
    NUMBER,
    PERCENT,
    POSITIVE,
    TEXT,
    WHOLE,
    Malformed,
    check,
    parse_json,
    read_text,
)

FORMAT = 1
_PROVENANCE = {
    "commit?": (TEXT, NULL),
    "dirty?": (FLAG, NULL),
    "versions?": (MAPPING, NULL),
    "cpu?": (TEXT, NULL),
    "gpu?": (TEXT, NULL),
}
_SHAPE = {
    "suite": TEXT,
    "run": TEXT,
    "axes": MAPPING,
    "result": {
        "evaluated_on": TEXT,
        "accuracy": (PERCENT, NULL),
        "module_accuracies": [(PERCENT, NULL)],
        "measure?": MEASURE,
        "score?": (NUMBER, NULL),
        "module_scores?": [(NUMBER, NULL)],
        "top5": (PERCENT, NULL),
        "loss": (NUMBER, NULL),
        "epochs": POSITIVE,
        "steps": POSITIVE,
        "curve": ({"step": [COUNT], "loss": [[(NUMBER, NULL)]]}, NULL),
    },
    "cost": {
        "predicted_memory": (COUNT, NULL),
        "peak_memory": (COUNT, NULL),
        "seconds_per_step": (AMOUNT, NULL),
        "processor_seconds_per_step?": (AMOUNT, NULL),
        "images_per_second": (AMOUNT, NULL),
        "seconds": AMOUNT,
        "jobs?": COUNT,
        "device?": TEXT,
    },
    "network": {
        "modules": [[TEXT]],
        "recipe?": {"method_kwargs": MAPPING, "recompute": FLAG},
        "parameters?": COUNT,
        "auxiliary_parameters?": [COUNT],
    },
    "data": {
        "name": TEXT,
        "source?": TEXT,
        "train_images": COUNT,
        "evaluated_images": POSITIVE,
        "img_size": POSITIVE,
        "classes": COUNT,
    },
    "config": {"method": TEXT, "seed": WHOLE},
    "provenance": {**_PROVENANCE, "resumed_with?": [_PROVENANCE]},
}


@dataclass(frozen=True)
class Record:
    """A finished run.

    Attributes:
        suite: name of the suite.
        run: name of the run within it.
        axes: the settings by which the suite's runs differ, such as method, modules, decoder, seed; keys are flags'
            names with underscores.
        result: the same for the same settings and versions, whenever and however often it was interrupted:
            "evaluated_on" ("test" or "validation"), "accuracy" (percent, of the network after the last epoch),
            "module_accuracies" (percent, of each module's head, the network's last; None where it has none); of a task
            with another headline "measure" (what it is), "score" and "module_scores" in their place; "top5" (percent or
            None), "loss" (mean cross-entropy), "epochs", "steps", and "curve": {"step": [...], "loss":
            [[one per module], ...]}, mean training losses since the step before; "test" with the accuracies and the
            loss of test images that are evaluated once, after training, where the others are for choosing settings.
        cost: "predicted_memory" and "peak_memory" (bytes of a training step, or None), "seconds_per_step" and
            "processor_seconds_per_step" (medians; the latter of all threads together), "device" (its type),
            "images_per_second", "seconds" (wall clock of the run, evaluation included), "jobs" (runs at once).
        network: "modules" (names of units of each), "parameters", "auxiliary_parameters" (of each module).
        data: "name", "source" ("folder", or "named" for torchvision's files), "train_images", "evaluated_images",
            "img_size", "classes" (their number), "identity" (tells whether the data have changed; version 0.1 did not
            record it).
        config: every setting, but for those that name places of one machine.
        provenance: commit, dirty, versions, machine, of the run's beginning; see `localprop.provenance`; and
            "resumed_with", a list of others that it was resumed with.
    """

    suite: str
    run: str
    axes: dict[str, Any]
    result: dict[str, Any]
    cost: dict[str, Any]
    network: dict[str, Any]
    data: dict[str, Any]
    config: dict[str, Any]
    provenance: dict[str, Any]

    @property
    def measure(self) -> Measure:
        """What the headline of its task measures."""
        recorded = self.result.get("measure")
        return Measure.of(recorded) if recorded else ACCURACY

    @property
    def score(self) -> float | None:
        """The network's headline score after the last epoch; None where it has none."""
        return _number(self.result.get("score" if "measure" in self.result else "accuracy"))

    @property
    def module_scores(self) -> list[float | None]:
        """The headline score of each module's head, the network's last; None where it has none."""
        found = self.result.get("module_scores" if "measure" in self.result else "module_accuracies")
        return [_number(value) for value in found or []]


def _number(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def write_record(path: Path, record: Record) -> None:
    """Writes a record as JSON, whole or not at all. Long lists of numbers take one line.

    Raises:
        CheckpointError: the disk is full, may not be written or fails.
    """
    content = asdict(record)
    curve, content["result"]["curve"] = content["result"]["curve"], None
    head, mark, tail = json.dumps({"format": FORMAT, **content}, indent=1).partition('"curve": null')
    write_text(path, head + mark.replace("null", json.dumps(curve)) + tail + "\n")


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """Every setting but for those that name places of one machine."""
    left_out = free("record")
    return {key: value for key, value in to_flat(config).items() if key not in left_out}


def read_record(path: Path) -> Record:
    """Reads what `write_record` wrote.

    Raises:
        BenchError: the file is missing, damaged or of another version.
    """
    try:
        content = parse_json(read_text(path))
        check(content, {"format": COUNT})
        if content.pop("format") != FORMAT:
            raise BenchError(f"{path} is of another version of localprop; move it away to run it again")
        check(content, _SHAPE)
        names = {field.name for field in fields(Record)}
        if unknown := sorted(content.keys() - names):
            raise Malformed(f"it has {unknown[0]!r}, which is unknown")
        _check_lengths(content)
        content["config"] = _config_as_recorded(content["config"])
        known = to_flat(TrainConfig())
        from_flat({key: value for key, value in content["config"].items() if key in known}, "config")
        return Record(**content)
    except OSError as error:
        raise BenchError(f"cannot read {path}: {error.strerror}") from None
    except (Malformed, ConfigError) as error:
        raise BenchError(f"{path} is no result of a run, or damaged; delete it to run it again ({error})") from None


def _config_as_recorded(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a record, with those that did not exist yet; what records leave out is not added."""
    left_out = free("record") - config.keys()
    return {key: value for key, value in settings_as_recorded(config).items() if key not in left_out}


def _check_lengths(content: dict[str, Any]) -> None:
    # End-to-end training has the loss and the prediction of the network alone, whatever the number of modules.
    exact = content["config"]["method"] == "end-to-end"
    result, modules = content["result"], 1 if exact else len(content["network"]["modules"])
    curve = result["curve"] or {"step": [], "loss": []}
    if len(result["module_accuracies"]) != modules:
        raise Malformed(f"result.module_accuracies has {len(result['module_accuracies'])} entries of {modules} modules")
    if len(result.get("module_scores", result["module_accuracies"])) != modules:
        raise Malformed(f"result.module_scores has {len(result['module_scores'])} entries of {modules} modules")
    if len(curve["step"]) != len(curve["loss"]) or any(len(losses) != modules for losses in curve["loss"]):
        raise Malformed("result.curve has not a loss of each module for each step")


def read_records(folder: Path) -> list[Record]:
    """All records in a folder, sorted by the names of their files.

    Raises:
        BenchError: there is no such folder, nothing in it, or something that is no record.
    """
    if not folder.is_dir():
        raise BenchError(f"{folder} is not a folder; name the one that `localprop bench SUITE` wrote")
    records = [read_record(path) for path in sorted(folder.glob("*.json"))]
    if not records:
        raise BenchError(
            f"{folder} has no results yet; run the suite first: {command('bench', 'SUITE', '--output', folder)}"
        )
    return records


def common_settings(records: Sequence[Record]) -> dict[str, Any]:
    """The settings in which no two records differ: the protocol."""
    first = records[0].config
    return {key: value for key, value in first.items() if all(r.config.get(key) == value for r in records)}
