"""What is done with a finished run: evaluating its weights, and handing them to timm."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import nn

from localprop.errors import CheckpointError, ConfigError, DataError, NonFiniteWeightError, first_line
from localprop.models.backbone import create_backbone, with_adapters
from localprop.models.lora import merged_weights
from localprop.registry import MODELS
from localprop.runs.description import read_description
from localprop.runs.experiment import prepare
from localprop.runs.recorded_data import evaluated_as, evaluation_of
from localprop.runs.recorded_settings import read_config
from localprop.settings.config import ModelConfig
from localprop.settings.flat import from_flat
from localprop.settings.trust import DESCRIPTIONS, without_starting_weights
from localprop.system.commands import resume_command
from localprop.system.files import folder_aside
from localprop.system.reading import Malformed, require_regular
from localprop.tasks.base import task_of
from localprop.training.checkpoints.loading import newest_checkpoint
from localprop.training.checkpoints.parts import whole_weights
from localprop.training.checkpoints.restoring import check_part
from localprop.training.finite import non_finite
from localprop.training.outputs import CHECKPOINTS, WEIGHTS
from localprop.training.scores import evaluate


def evaluate_run(folder: Path, changes: dict[str, Any], plugin: Path | None = None) -> tuple[dict[str, Any], list[str]]:
    """Evaluates a run's weights, on images prepared as the run recorded and as its export says.

    Args:
        folder: run folder.
        changes: settings that differ from the run's own: data, data_dir, batch_size, device, val_split. Without the
            last, the test images are taken, whatever the run was evaluated on; of a folder those in test/, else in
            val/, else in class folders in the folder itself.
        plugin: the run's plugin, which the user has named.

    Returns:
        run, weights, data, images, top1 and top5 in percent (top5 from 6 classes on), loss; and lines for the user.

    Raises:
        CheckpointError: no run folder, or no weights in it.
        DataError: the data has other classes than the run.
    """
    # In float32 and wherever this machine can, whatever the run was trained with.
    anywhere = {"amp": False, "device": None, "hold_on_device": False, "val_split": 0.0}
    anywhere |= {"offload_optimizer": False, "offload_boundaries": False}
    if "batch_size" in changes:
        anywhere["micro_batches"] = 1
    config = from_flat({**anywhere, **changes}, "eval", read_config(folder, plugin))
    description = read_description(folder)
    own = config.backbone
    experiment = prepare(replace(config, backbone=_plain(own)), weights=False, classes=description["classes"])
    evaluation, notes = evaluation_of(folder, description)
    data = evaluated_as(folder, experiment.data, evaluation)
    device = experiment.device
    if data.classes != description["classes"]:
        raise DataError(f"{data.name} has other classes than {folder} was trained on; see {folder}/run.json")
    source = load_weights(folder, experiment.backbone, replace(own, img_size=experiment.data.img_size))
    experiment.backbone.eval()
    batches = data.test_batches(config.optim.batch_size // config.optim.micro_batches, device)
    scores = evaluate(data.task, experiment.backbone, batches)
    result: dict[str, Any] = {
        "run": str(folder),
        "weights": source,
        "data": data.name,
        "evaluated_on": data.evaluated_on,
    }
    result[f"{data.task.unit}s"] = scores.examples
    for measure, value in zip(data.task.measures, scores.network, strict=True):
        # Version 0.1 called the accuracy top1.
        name = "top1" if measure.name == "accuracy" else measure.name
        if value is not None and math.isfinite(value):  # JSON has no other numbers
            result[name] = round(value, 3 if measure.percent else 5)
    return result, data.notes + notes


def export_run(folder: Path, output: Path | None, plugin: Path | None = None) -> tuple[Path, str, list[str]]:
    """Writes a run's weights and a config.json that `timm.create_model("local-dir:...", pretrained=True)` loads.

    What `timm.data.resolve_data_config` reads there is what the run was evaluated with.

    Returns:
        The folder, Python code that loads what is in it, and lines for the user.

    Raises:
        CheckpointError: no run folder, or no weights in it.
        ConfigError: `output` exists already.
    """
    # A link that the user names is meant; one inside the run folder was put there by whoever made it.
    place = output.resolve() if output else folder / "export"
    output = output or place
    if place.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise ConfigError(f"{output} exists already; choose another --output, or delete it")
    description = read_description(folder)
    config = read_config(folder, plugin)
    own = config.backbone
    own_kwargs = without_starting_weights(description["model_kwargs"])
    try:
        model, kwargs, _ = create_backbone(_plain(replace(own, pretrained=False, model_kwargs=own_kwargs)), None)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from None
    load_weights(folder, model, own)
    # Else it is a plugin's, not built by what loads weights in timm.
    loads = hasattr(model, "pretrained_cfg") and own.model not in MODELS
    task = task_of(config.data, description["classes"])
    settings = _described(model, own.model, task.outputs or 0)
    if not own.pretrained:
        # The weights are new: timm's tag and licence are those of weights that have no part in them.
        for key in ("tag", "license", "origin_url", "paper_name", "paper_ids", "notes", "description"):
            settings.pop(key, None)
    for key in ("test_input_size", "test_crop_pct"):  # of the weights that timm has
        settings.pop(key, None)
    evaluation, notes = evaluation_of(folder, description)
    model.pretrained_cfg = {**settings, **evaluation}  # type: ignore[assignment]
    # timm takes the description of the weights from pretrained_cfg, which the export has.
    arguments = {key: value for key, value in kwargs.items() if key not in ("num_classes", *DESCRIPTIONS)}
    with folder_aside(place) as aside:
        labels = {"label_names": description["classes"]} if task.names_outputs else {}
        try:
            save_for_hf(model, str(aside), model_config=labels, model_args=arguments, safe_serialization=True)
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            line = str(error).partition("\n")[0]
            raise ConfigError(f"{folder}: timm cannot export a model of {arguments}: {line}") from None
    return output, _code(output, own.model, kwargs, loads), notes


def _code(output: Path, name: str, kwargs: dict[str, Any], loads: bool) -> str:
    """Python code that gives an exported model."""
    if loads:
        return f"import timm\nmodel = timm.create_model({f'local-dir:{output}'!r}, pretrained=True)"
    values = [f"{key}={value!r}" for key, value in kwargs.items()]
    package, build = "timm", f"timm.create_model({', '.join([repr(name), *values])})"
    if name in MODELS:
        package, build = "localprop", f"localprop.MODELS[{name!r}]({', '.join(values)})"
    weights = str(output / "model.safetensors")
    return (
        f"import {package}\nfrom safetensors.torch import load_file\nmodel = {build}  # with its plugin loaded\n"
        f"model.load_state_dict(load_file({weights!r}))"
    )


def _described(model: nn.Module, name: str, outputs: int) -> dict[str, Any]:
    """A copy of a model's pretrained_cfg. One that is not timm's own gets what `save_for_hf` asks of it."""
    settings: dict[str, Any] = dict(getattr(model, "pretrained_cfg", None) or {})
    widths = [module.in_features for module in model.modules() if isinstance(module, nn.Linear)]
    for attribute, value in (("num_classes", outputs), ("num_features", widths[-1] if widths else 0)):
        if not hasattr(model, attribute):
            setattr(model, attribute, value)
    return {"architecture": name, **settings}


def _plain(config: ModelConfig) -> ModelConfig:
    """The settings of a model without adapters: into its weights they are merged."""
    return replace(config, lora=None, lora_alpha=None, lora_targets=None)


def load_weights(folder: Path, model: nn.Module, config: ModelConfig) -> str:
    """Loads a run's final weights, or those of its newest checkpoint while it has none; returns their place.

    Args:
        folder: the run folder.
        model: the run's, without adapters.
        config: the run's settings of it. The weights of a checkpoint are merged with their adapters.

    Raises:
        CheckpointError: neither is there, or they do not fit.
    """
    path = folder / WEIGHTS
    try:
        if path.exists():
            require_regular(path)
            weights = load_file(path)
        else:
            checkpoint, notes = newest_checkpoint(folder / CHECKPOINTS, flaw=_flaw)
            if checkpoint is None:
                reasons = f" ({'; '.join(notes)})" if notes else ""
                raise CheckpointError(f"{folder} has no weights yet{reasons}; train it: {resume_command(folder)}")
            path, weights = checkpoint.path, whole_weights(checkpoint.parts)
            if config.lora:
                weights = merged_weights(with_adapters(copy.deepcopy(model), config), weights)
        infinite = non_finite(dict(model.named_buffers(remove_duplicate=False)))
        model.load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError, Malformed) as error:
        line = first_line(error)
        raise CheckpointError(f"{path} does not fit the model or is damaged ({line}); export it anew") from None
    if bad := [name for name in non_finite(weights) if name not in infinite]:
        raise NonFiniteWeightError(f"{path}: {bad[0]} is not finite; resume from an earlier checkpoint or train anew")
    return str(path)


def _flaw(parts: dict[str, Any]) -> str | None:
    try:
        for part in parts.values():
            check_part(part)
    except Malformed as error:
        return str(error)
    return None
