"""Run folders: making one, what is written about a run, and finding and reading an old one."""

import datetime
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from localprop.checkpoint import has_checkpoint
from localprop.config import TrainConfig
from localprop.data import Data, require_same
from localprop.errors import CheckpointError, ConfigError, LocalpropError
from localprop.experiment import Experiment
from localprop.files import write_text
from localprop.flat import from_flat, to_flat
from localprop.network import LocalNetwork
from localprop.provenance import provenance
from localprop.trainer import CHECKPOINTS, RESULTS, WEIGHTS
from localprop.values import read_yaml

CONFIG = "config.yaml"
RUN = "run.json"


def create_run_folder(config: TrainConfig) -> Path:
    """A new folder for a run.

    Raises:
        ConfigError: the folder exists already, or cannot be made.
    """
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    data = Path(config.data.data.removeprefix("folder:")).name
    base = config.run.experiment or f"{stamp}-{data}-{config.local.method}"
    for suffix in ["", *(f"-{i}" for i in range(2, 100))]:
        config.run.require_new_folder()  # again each time: another run may have made it just now
        folder = config.run.output / (base + suffix)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if config.run.experiment:  # an empty one
                return folder
        except OSError as error:
            raise ConfigError(f"cannot make the run folder {folder}: {error.strerror}; choose --output") from None
    raise ConfigError(f"{folder} and a hundred more exist already; choose another --experiment")


def write_description(folder: Path, experiment: Experiment, net: LocalNetwork, job: str | None = None) -> None:
    """Writes config.yaml, everything needed to run it again, and run.json, what came of it; `job` names torchrun's."""
    write_text(folder / CONFIG, _settings(experiment.config))
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
    if job:
        description["job"] = job
    write_text(folder / RUN, json.dumps(description, indent=2) + "\n")


def _settings(config: TrainConfig) -> str:
    settings = to_flat(config)
    for name in ("resume", "parallel", "nproc", "trace"):  # where it runs, not what it is: it may go on otherwise
        del settings[name]
    return yaml.safe_dump(settings, sort_keys=False)


def left_by(job: str, config: TrainConfig) -> Path | None:
    """The run folder that an earlier attempt of a job began; None if there is none.

    Names of jobs are torchrun's, and often no more than "none": a run is that job's if its settings are the same, too.
    """
    try:
        named = config.run.experiment
        folder = config.run.output / named if named else newest_run(config.run.output)
        same = read_description(folder).get("job") == job and (folder / CONFIG).read_text() == _settings(config)
        return folder if same else None
    except (LocalpropError, OSError):
        return None


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
    if not (folder / RUN).exists():  # it ended before it began
        return data, []
    description = read_description(folder)
    notes = _compare(folder, description, data)
    evaluation, _ = evaluation_of(folder, description)
    return evaluated_as(folder, data, evaluation), notes


def evaluation_of(folder: Path, description: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """How a run's images are evaluated, as `Data.evaluation` has it; and a line for the user where 0.1 recorded less.

    Raises:
        CheckpointError: run.json is damaged.
    """
    if "evaluation" in description:
        return description["evaluation"], []
    try:
        keys = ("input_size", "mean", "std", "interpolation", "crop_pct")
        evaluation = {key: description[key] for key in keys}
    except (KeyError, TypeError):
        raise CheckpointError(f"{folder / RUN} is damaged: it does not say how images are evaluated") from None
    # Version 0.1 changed the aspect ratio of small images, and cut out the middle of large ones.
    mode, words = ("squash", "squeezed") if evaluation["crop_pct"] == 1 else ("center", "cropped")
    note = f"{folder} was made by version 0.1: its images are {words} in evaluation, as they were then"
    return {**evaluation, "crop_mode": mode}, [note]


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


def note_resumption(folder: Path) -> None:
    """Adds to run.json with what a run goes on, if that is another commit, version or machine than before.

    Raises:
        CheckpointError: run.json is missing or damaged, or the disk fails.
    """
    description, now = read_description(folder), provenance()
    known = [description["provenance"], *description.get("resumed_with", [])]
    if all({**other, "date": now["date"], "threads": now["threads"]} != now for other in known):
        description["resumed_with"] = [*description.get("resumed_with", []), now]
        write_text(folder / RUN, json.dumps(description, indent=2) + "\n")


def read_config(folder: Path) -> TrainConfig:
    """The settings of an old run.

    Raises:
        CheckpointError: the folder is no run folder.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} is no run folder: it has no {CONFIG}")
    return from_flat(read_yaml(path), str(path))


def read_description(folder: Path) -> dict[str, Any]:
    """What `write_description` wrote into run.json.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        return json.loads((folder / RUN).read_text())
    except (OSError, ValueError):
        raise CheckpointError(f"{folder} is no run folder: its {RUN} is missing or damaged") from None


def newest_run(output: Path) -> Path:
    """The run folder under `output`, at any depth, that was written to last among those that can be resumed.

    A run without a checkpoint is taken only where no run has one.

    Raises:
        CheckpointError: there is none.
    """
    runs = list(_runs_in(output))
    candidates = [run for run in runs if has_checkpoint(run / CHECKPOINTS)] or [run for run in runs if is_unbegun(run)]
    if not candidates:
        raise CheckpointError(f"no run to resume in {output}; name one: --resume FOLDER")
    return max(candidates, key=_last_written)


def is_unbegun(folder: Path) -> bool:
    """Whether a run ended before its first checkpoint, so that resuming it can only mean to start it anew."""
    return not has_checkpoint(folder / CHECKPOINTS) and not any((folder / name).exists() for name in (RESULTS, WEIGHTS))


def _runs_in(output: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(output):
        if CONFIG in files:
            yield Path(place)
            folders.clear()  # a run holds no other
        folders[:] = [name for name in folders if not name.startswith(".")]


def _last_written(run: Path) -> float:
    return max(path.stat().st_mtime for path in (run, run / CONFIG, *run.glob("check*")))
