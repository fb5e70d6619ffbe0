"""run.json of a run folder: what was made of the settings of a run, and with what."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from localprop.errors import CheckpointError, ConfigError
from localprop.network.network import LocalNetwork
from localprop.report.measures import ACCURACIES, MEASURE, Measure
from localprop.runs.experiment import Experiment
from localprop.runs.recorded_settings import CONFIG, recorded_plugin, settings_text
from localprop.system.commands import command
from localprop.system.files import write_text
from localprop.system.plugins import load_plugin, plugin_record
from localprop.system.provenance import provenance
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
    Kind,
    Malformed,
    check,
    parse_json,
    read_text,
)
from localprop.tasks.base import Task
from localprop.training.scores import Scores

RUN = "run.json"
_PROVENANCE = {"commit": (TEXT, NULL), "versions": MAPPING, "date": TEXT, "threads": COUNT}
_SIZE = Kind("three whole numbers", lambda value: isinstance(value, list) and [type(n) for n in value] == [int] * 3)
_DESCRIPTION = {
    "model": TEXT,
    "model_kwargs": MAPPING,
    "input_size": _SIZE,
    "mean?": [NUMBER],
    "std?": [NUMBER],
    "crop_pct?": NUMBER,
    "interpolation?": TEXT,
    "evaluation?": MAPPING,
    "classes": [TEXT],
    "modules": [[TEXT]],
    "recipe?": {"method_kwargs": MAPPING, "recompute": FLAG},
    "parameters": COUNT,
    "auxiliary_parameters": [COUNT],
    "data": TEXT,
    "data_identity?": MAPPING,
    "evaluated_on": TEXT,
    "train_images": POSITIVE,
    "evaluated_images": POSITIVE,
    "steps": POSITIVE,
    "finish?": {"after_step": POSITIVE, "lr": AMOUNT},
    "device": TEXT,
    "provenance": _PROVENANCE,
    "resumed_with?": [_PROVENANCE],
    "plugin?": {"path": TEXT, "sha256": TEXT},
    "unit?": TEXT,
    "measures?": [MEASURE],
    "test?": {"images?": POSITIVE, "accuracy?": PERCENT},
    "job?": TEXT,
}


def write_description(folder: Path, experiment: Experiment, net: LocalNetwork, job: str | None = None) -> None:
    """Writes config.yaml, everything needed to run it again, and run.json, what came of it; `job` names torchrun's."""
    write_text(folder / CONFIG, settings_text(experiment.config))
    data = experiment.data
    description = {
        "model": experiment.config.backbone.model,
        "model_kwargs": experiment.model_kwargs,
        "input_size": [3, data.img_size, data.img_size],
        "evaluation": data.evaluation,
        "classes": data.classes,
        "modules": [module.units for module in net.local_modules],
        "parameters": sum(p.numel() for p in net.backbone.parameters()),
        "auxiliary_parameters": [
            sum(p.numel() for p in module.local_loss.parameters()) for module in net.local_modules
        ],
        "data": data.name,
        "data_identity": data.identity,
        "evaluated_on": data.evaluated_on,
        "train_images": data.train_size,
        "evaluated_images": data.test_size,
        "unit": data.task.unit,
        "measures": [measure.record() for measure in data.task.measures],
        "steps": experiment.steps,
        "device": experiment.device.type,
        "provenance": provenance(),
    }
    if experiment.config.backbone.plugin:
        description["plugin"] = plugin_record(experiment.config.backbone.plugin)
    if experiment.config.local.finish:
        description["finish"] = {"after_step": experiment.steps_before_finish, "lr": experiment.config.in_finish.lr}
    if net.recipe:
        description["recipe"] = net.recipe.record()
    if job:
        description["job"] = job
    write_text(folder / RUN, json.dumps(description, indent=2) + "\n")


def measures_of(description: Mapping[str, Any]) -> tuple[Measure, ...]:
    """What the task of a run measures, as `read_description` gives it; version 0.1 measured accuracies alone."""
    recorded = description.get("measures")
    return tuple(map(Measure.of, recorded)) if recorded else ACCURACIES


def note_tested(folder: Path, scores: Scores) -> None:
    """Adds to run.json what the test images came to that are looked at once, after training.

    Raises:
        CheckpointError: run.json is missing or damaged, or the disk fails.
    """
    description = {**read_description(folder), "test": scores.record()}
    write_text(folder / RUN, json.dumps(description, indent=2) + "\n")


def tested_before(folder: Path) -> dict[str, Any] | None:
    """What `note_tested` added to run.json; None where it added nothing.

    Raises:
        CheckpointError: run.json is missing or damaged.
    """
    return read_description(folder).get("test")


def tested_line(folder: Path, task: Task) -> str | None:
    """What `note_tested` added, in words; None where it added nothing.

    Raises:
        CheckpointError: run.json is missing or damaged.
    """
    tested, measure, examples = tested_before(folder), task.measures[0], f"{task.unit}s"
    if tested is None:
        return None
    try:
        check(tested, {measure.name: (NUMBER, NULL), examples: POSITIVE})
    except Malformed as error:
        raise CheckpointError(f"{folder / RUN} is damaged: test.{error}; restore it, or start a new run") from None
    score = f"{measure.text(tested[measure.name])}{measure.sign}"
    return f"test {measure.name} {score}, of {tested[examples]} {examples}"


def note_resumption(folder: Path) -> None:
    """Adds to run.json the commit, versions and machine that a run is resumed with, if they are new.

    Raises:
        CheckpointError: run.json is missing or damaged, or the disk fails.
    """
    description, now = read_description(folder), provenance()
    known = [description["provenance"], *description.get("resumed_with", [])]
    if all({**other, "date": now["date"], "threads": now["threads"]} != now for other in known):
        description["resumed_with"] = [*description.get("resumed_with", []), now]
        write_text(folder / RUN, json.dumps(description, indent=2) + "\n")


def require_plugin(folder: Path, named: Path | None, words: Sequence[str]) -> str | None:
    """Runs the plugin that a run was trained with, if the user has named it.

    Args:
        folder: the run folder.
        named: the plugin on the command line.
        words: the command line, from the command's name on.

    Returns:
        A line for the user, where the run does not tell whether it is the same plugin.

    Raises:
        ConfigError: it is not named, or another one is; the line says what to type.
        CheckpointError: the folder is no run folder.
    """
    path = recorded_plugin(folder)
    if path is None:
        if named:
            raise ConfigError(f"{folder} was trained without a plugin; leave out --plugin")
        return None
    if named is None:
        again = command(*words, "--plugin", str(path))
        raise ConfigError(
            f"{folder} was trained with the plugin {path}, and a run folder may not choose which code runs; if you "
            f"trust it, type: {again}"
        )
    record = read_description(folder).get("plugin") if (folder / RUN).exists() else None
    load_plugin(named, record["sha256"] if record else None)
    if record:
        return None
    return f"{folder} does not record the SHA-256 of its plugin, as version 0.1 did not: {named} is taken as it is"


def read_description(folder: Path) -> dict[str, Any]:
    """What `write_description` wrote into run.json.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = folder / RUN
    try:
        description = parse_json(read_text(path))
        check(description, _DESCRIPTION)
    except OSError as error:
        raise CheckpointError(f"{folder} is no run folder: {path}: {error.strerror}") from None
    except Malformed as error:
        raise CheckpointError(f"{path} is damaged: {error}; restore it, or start a new run") from None
    return description
