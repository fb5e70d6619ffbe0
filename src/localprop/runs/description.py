"""What a run folder says of its run: config.yaml, its settings, and run.json, what was made of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from localprop.data.base import Data
from localprop.data.identity import require_same
from localprop.data.view import evaluation_record, read_evaluation
from localprop.errors import CheckpointError, ConfigError
from localprop.network.network import LocalNetwork
from localprop.runs.experiment import Experiment
from localprop.settings.config import TrainConfig
from localprop.settings.flat import free, from_flat, plain_keys, to_flat
from localprop.settings.values import read_yaml
from localprop.system.commands import command
from localprop.system.files import write_text
from localprop.system.plugins import load_plugin, plugin_record
from localprop.system.provenance import provenance
from localprop.system.reading import (
    COUNT,
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
from localprop.training.scores import Scores

CONFIG = "config.yaml"
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
    "parameters": COUNT,
    "auxiliary_parameters": [COUNT],
    "data": TEXT,
    "data_identity?": MAPPING,
    "evaluated_on": TEXT,
    "train_images": POSITIVE,
    "evaluated_images": POSITIVE,
    "steps": POSITIVE,
    "device": TEXT,
    "provenance": _PROVENANCE,
    "resumed_with?": [_PROVENANCE],
    "plugin?": {"path": TEXT, "sha256": TEXT},
    "test?": {"images": POSITIVE, "accuracy": PERCENT},
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
        "auxiliary_parameters": [sum(p.numel() for p in module.auxiliary.parameters()) for module in net.local_modules],
        "data": data.name,
        "data_identity": data.identity,
        "evaluated_on": data.evaluated_on,
        "train_images": data.train_size,
        "evaluated_images": data.test_size,
        "steps": data.steps_per_epoch(experiment.config.optim.batch_size) * experiment.config.optim.epochs,
        "device": experiment.device.type,
        "provenance": provenance(),
    }
    if experiment.config.backbone.plugin:
        description["plugin"] = plugin_record(experiment.config.backbone.plugin)
    if job:
        description["job"] = job
    write_text(folder / RUN, json.dumps(description, indent=2) + "\n")


def settings_text(config: TrainConfig) -> str:
    """The content of config.yaml."""
    settings = to_flat(config)
    for name in free("config"):
        del settings[name]
    return yaml.safe_dump(settings, sort_keys=False)


def data_of_run(folder: Path, data: Data) -> tuple[Data, list[str]]:
    """The data of a run that is resumed, evaluated as before.

    Args:
        folder: the run folder.
        data: the data that are there.

    Returns:
        `data`, with the evaluation that the run recorded; and lines for the user, where it recorded less.

    Raises:
        DataError: they are not those that the run began with.
        CheckpointError: run.json is damaged.
    """
    description = read_description(folder)
    notes = _compare(folder, description, data)
    evaluation, _ = evaluation_of(folder, description)
    if description.get("evaluated_on") == "test" and data.final_store:
        # As version 0.1 did it where test/ and val/ were both there; the curve would mean two things otherwise.
        data = data.testing_early()
    return evaluated_as(folder, data, evaluation), notes


def evaluation_of(folder: Path, description: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """How a run's images are evaluated, as `Data.evaluation` has it; and a line for the user where 0.1 recorded less.

    Raises:
        CheckpointError: run.json is damaged.
    """
    if "evaluation" in description:
        return _checked(folder, description["evaluation"]), []
    try:
        keys = ("input_size", "mean", "std", "interpolation", "crop_pct")
        evaluation = {key: description[key] for key in keys}
    except (KeyError, TypeError):
        raise CheckpointError(f"{folder / RUN} is damaged: it does not say how images are evaluated") from None
    # Version 0.1 changed the aspect ratio of small images, and cut out the middle of large ones.
    mode, words = ("squash", "squeezed") if evaluation["crop_pct"] == 1 else ("center", "cropped")
    note = f"{folder} was made by version 0.1: its images are {words} in evaluation, as they were then"
    return _checked(folder, {**evaluation, "crop_mode": mode}), [note]


def _checked(folder: Path, evaluation: Any) -> dict[str, Any]:
    """The recorded evaluation, with unknown keys removed: an export hands all of it to timm."""
    try:
        return evaluation_record(*read_evaluation(evaluation))
    except ValueError as error:
        raise CheckpointError(f"{folder / RUN} is damaged in what it says of evaluation: {error}") from None


def evaluated_as(folder: Path, data: Data, evaluation: dict[str, Any]) -> Data:
    """The data, evaluated as a run recorded.

    Raises:
        CheckpointError: what it recorded is damaged.
    """
    try:
        return data.evaluated_as(evaluation)
    except ValueError as error:
        raise CheckpointError(f"{folder / RUN} is damaged in what it says of evaluation: {error}") from None


def _compare(folder: Path, description: dict[str, Any], data: Data) -> list[str]:
    if "data_identity" in description:
        require_same(description["data_identity"], data.identity, str(folder))
        return []
    known = {"classes": description.get("classes"), "train_images": description.get("train_images")}
    require_same(known, {**data.identity, "train_images": data.train_size}, str(folder))
    return [f"{folder} was made by version 0.1: whether its images are still the same cannot be told, only how many"]


def note_tested(folder: Path, scores: Scores) -> None:
    """Adds to run.json what the test images came to that are looked at once, after training.

    Raises:
        CheckpointError: run.json is missing or damaged, or the disk fails.
    """
    found = {
        "images": scores.images,
        "accuracy": scores.top1[-1],
        "module_accuracies": scores.top1,
        "top5": scores.top5,
        "loss": scores.loss,
    }
    write_text(folder / RUN, json.dumps({**read_description(folder), "test": found}, indent=2) + "\n")


def tested_before(folder: Path) -> dict[str, Any] | None:
    """What `note_tested` added to run.json; None where it added nothing.

    Raises:
        CheckpointError: run.json is missing or damaged.
    """
    return read_description(folder).get("test")


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


def read_config(folder: Path, plugin: Path | None = None) -> TrainConfig:
    """The settings of an old run, but for what its files do not decide.

    Args:
        folder: the run folder, perhaps a stranger's.
        plugin: the run's plugin, where the user has named it: see `require_plugin`. Its settings never name one.

    Raises:
        CheckpointError: the folder is no run folder.
        ConfigError: a setting does not exist or has an impossible value.
    """
    settings = _read_settings(folder)
    if misplaced := free("config") & settings.keys():
        raise ConfigError(f"{folder / CONFIG}: {min(misplaced)} is not what a run is, only where it runs; remove that")
    # The data were there when the run began: fetching them again is the user's choice.
    return from_flat({**settings, "plugin": plugin, "download": False}, str(folder / CONFIG))


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
    path = _read_settings(folder).get("plugin")
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


def recorded_plugin(folder: Path) -> str | None:
    """The path of the plugin that a run was trained with, as its settings have it."""
    return _read_settings(folder).get("plugin")


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} is no run folder: it has no {CONFIG}")
    settings = plain_keys(read_yaml(path), str(path))
    plugin = settings.get("plugin")
    if not isinstance(plugin, str | None):
        raise ConfigError(f"{path}: plugin is {plugin!r}, expected a path")
    return settings


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
