"""From settings to things: data, backbone and network."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from localprop.data.base import Data
from localprop.data.loading import FOLDER, load_data, load_evaluated
from localprop.division.divide import divide
from localprop.division.exactly import exactly
from localprop.division.resolve import with_methods_defaults
from localprop.errors import ChainError, ConfigError
from localprop.models.backbone import create_backbone, native_size
from localprop.models.sources import Source, with_source
from localprop.network.network import LocalNetwork
from localprop.settings.config import DEFAULT_MODEL, SMALL_SWIN, TrainConfig
from localprop.settings.recipe import Recipe
from localprop.settings.trust import without_starting_weights
from localprop.system.plugins import load_plugin
from localprop.training.compiling import compile_network, require_compiler
from localprop.training.optimizers import LOW_BIT

_SMALL_IMAGE = 96


@dataclass(frozen=True)
class Experiment:
    """Everything a run needs, built from its settings.

    Attributes:
        config: the settings, with every default that depends on others filled in.
        data: the dataset.
        backbone: the model, on its device.
        model_kwargs: with which `timm.create_model` gives the same model.
        device: where it is.
        recorded: what the network of a run that is resumed is made of; None for a new run.
        folder: of that run.
    """

    config: TrainConfig
    data: Data
    backbone: nn.Module
    model_kwargs: dict[str, Any]
    device: torch.device
    recorded: Recipe | None = None
    folder: Path | None = None

    @property
    def recipe(self) -> Recipe:
        """What the network is made of."""
        return self.recorded or self.config.local.recipe

    def localize(self) -> LocalNetwork:
        """The backbone as a local network, on its device, compiled if asked.

        Raises:
            ConfigError, ChainError: the settings do not fit the model, or there is no compiler that they need.
        """
        data, optim = self.data, self.config.optim
        try:
            net = divide(
                self.backbone,
                self.recipe,
                input_size=self.input_size,
                batch_size=optim.batch_size,
                micro_batches=optim.micro_batches,
                amp_dtype=getattr(torch, optim.amp_dtype) if optim.amp else None,
                task=data.task,
                mean=data.mean,
                std=data.std,
            )
        except (ChainError, ConfigError) as error:
            if self.folder is None:
                raise
            raise type(error)(f"{self.folder}: {error}") from None
        if self.config.optim.opt in LOW_BIT and self.device.type != "cpu":
            require_compiler(self.device, f"--opt {self.config.optim.opt}")
        if self.config.run.compile:
            require_compiler(self.device, "--compile")
            compile_network(net)
        return net

    def networks(self) -> list[LocalNetwork]:
        """What `localize` gives, and with a finish the network of that, on the same backbone; errors as there."""
        nets = [self.localize()]
        if self.config.local.finish:
            nets.append(exactly(nets[0]))
            if self.config.run.compile:
                compile_network(nets[1])
        return nets

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images."""
        return (3, self.data.img_size, self.data.img_size)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch."""
        return self.data.steps_per_epoch(self.config.optim.batch_size)

    @property
    def steps(self) -> int:
        """Steps of all epochs."""
        return self.steps_per_epoch * self.config.optim.epochs

    @property
    def steps_before_finish(self) -> int:
        """Steps of the epochs before the finish; of all epochs without one."""
        return self.steps_per_epoch * self.config.before_finish.epochs

    @property
    def title(self) -> str:
        """What is trained on what, for a heading."""
        return f"{self.config.local.method}, {self.config.backbone.model} on {self.data.name}"


def prepare(config: TrainConfig, weights: bool = True, classes: list[str] | None = None) -> Experiment:
    """Loads the data and builds the model; seeds PyTorch, so that the same settings give the same weights.

    Args:
        config: the settings.
        weights: whether pretrained weights are wanted at all; not where others will take their place.
        classes: of a run that is only to be evaluated: of a folder its training images are not looked at then.

    Raises:
        ConfigError, DataError: the settings name something that does not exist or does not fit.
    """
    device = _device(config)
    load_plugin(config.backbone.plugin)
    source = None
    if weights:
        found, source = with_source(config.backbone)
        config = replace(config, backbone=found)
    data = _load(config, classes, source)
    model = replace(config.backbone, img_size=data.img_size)
    if model.model_kwargs is None:
        small = model.model == DEFAULT_MODEL and data.img_size <= _SMALL_IMAGE
        model = replace(model, model_kwargs=SMALL_SWIN if small else {})
    torch.manual_seed(config.run.seed)
    built = model
    if not weights:
        built = replace(model, pretrained=False, model_kwargs=without_starting_weights(model.model_kwargs or {}))
    backbone, kwargs, notes = create_backbone(built, data.task.outputs, source)
    kwargs = without_starting_weights(kwargs)
    if weights and model.starts_trained:
        # A plugin's model may have no settings.
        data = data.as_trained((source and source.settings) or getattr(backbone, "pretrained_cfg", None) or {})
    data = replace(data, notes=[*data.notes, *notes])
    config = replace(config, backbone=model, local=with_methods_defaults(config.local))
    return Experiment(config, data, backbone.to(device), kwargs, device)


def _load(config: TrainConfig, classes: list[str] | None, source: Source | None) -> Data:
    size, seed = config.backbone.img_size, config.run.seed
    if classes and size and config.data.data.startswith(FOLDER) and not config.data.val_split:
        return load_evaluated(config.data, classes, size, seed)
    return load_data(config.data, size, seed, native_size(config.backbone, source))


def _device(config: TrainConfig) -> torch.device:
    name = config.run.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # a meta device has tensors, but no numbers
    except (RuntimeError, AssertionError, ImportError):
        count = torch.cuda.device_count()
        raise ConfigError(f"--device {name!r}: this machine has a cpu and {count} CUDA devices") from None
    if config.optim.amp and config.optim.amp_dtype == "float16" and device.type != "cuda":
        raise ConfigError("--amp-dtype float16 needs CUDA; use bfloat16")
    needs = {
        "--offload-optimizer": config.optim.offload_optimizer,
        "--offload-boundaries": config.optim.offload_boundaries,
        "--cuda-graphs on": config.run.cuda_graphs == "on",
    }
    if (asked := [flag for flag, value in needs.items() if value]) and device.type != "cuda":
        raise ConfigError(f"{asked[0]} needs CUDA, and the device is {device}; leave it out")
    return device
