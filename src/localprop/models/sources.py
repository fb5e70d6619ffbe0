"""Weights that training starts from, and what is known of them: a file, a folder, or a model of a hub."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm.models
from torch import Tensor

from localprop.errors import ConfigError, first_line, listing
from localprop.models.hub import require_reachable
from localprop.settings.config import DEFAULT_MODEL, ModelConfig
from localprop.settings.trust import refuse_further_weights, without_starting_weights
from localprop.system.commands import resume_command
from localprop.system.reading import MAPPING, TEXT, Malformed, check, parse_json, read_text, require_regular

LOCAL, HUB = "local-dir:", "hf-hub:"
"""What stands before the place of a model's description and weights, as timm has it."""
_RUN, _TIMM, _WEIGHTS = "run.json", "config.json", "model.safetensors"
_USUAL = (_WEIGHTS, "pytorch_model.bin", "pytorch_model.pth", "model.pth")
_SUFFIXES = (".safetensors", ".pth", ".pth.tar", ".bin", ".pt")
_KINDS = "safetensors, or tensors that torch.save has written"


@dataclass(frozen=True)
class Source:
    """Weights that training starts from.

    Attributes:
        place: the file, the folder, or `hf-hub:NAME`, as the user named it.
        file: the file of tensors; None of the Hub.
        model: the name of their model; None where nothing says so.
        model_kwargs: the arguments that it was built with.
        settings: what timm's `pretrained_cfg` says of them: mean, std, input_size, crop_pct, ...; empty where nothing
            does.
    """

    place: str
    file: Path | None
    model: str | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, without the prefixes of wrappers such as `module.`; nothing is unpickled.

        Raises:
            ConfigError: they cannot be read.
        """
        try:
            if self.file is None:
                found: Any = timm.models.load_state_dict_from_hf(self.place.removeprefix(HUB))
            else:
                require_regular(self.file)
                found = timm.models.load_state_dict(str(self.file), weights_only=True)
        except OSError as error:
            raise ConfigError(
                f"{self.file or self.place} cannot be read: {error.strerror or first_line(error)}"
            ) from None
        except Exception as error:  # whatever torch, safetensors or the hub's client may raise
            line = first_line(error).removesuffix(".")
            raise ConfigError(
                f"{self.file or self.place} is no file of weights ({line}); it must be {_KINDS}"
            ) from None
        tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)} if found else {}
        if not tensors:
            keys = listing(found) or "nothing"
            raise ConfigError(f"{self.file or self.place} has no tensors by name, only {keys}; it must be {_KINDS}")
        return tensors


def with_source(config: ModelConfig) -> tuple[ModelConfig, Source | None]:
    """The settings of a model with its name and arguments, where a folder says them, and the weights to start from.

    Args:
        config: whose `model` may be `local-dir:FOLDER` or `hf-hub:NAME`, and whose `initial_checkpoint` may be a file,
            a folder or `hf-hub:NAME`.

    Returns:
        Settings whose `model` is a plain name, so that nothing but the weights depends on their place; and the weights.

    Raises:
        ConfigError: there is no such place, it says nothing, or it is of another model than the settings name.
    """
    name = config.model.replace("hf_hub:", HUB)
    place = config.initial_checkpoint
    named = name.startswith((LOCAL, HUB))
    if named and place is not None:
        raise ConfigError(f"--model {name} names the weights to start from; leave out --initial-checkpoint")
    if place is not None and config.pretrained:
        raise ConfigError("--pretrained and --initial-checkpoint both name the weights to start from; leave out one")
    if named:
        place = name.removeprefix(LOCAL)
    if place is None:
        return config, None
    source = _from_hub(place) if place.startswith(HUB) else _from_disk(place)
    if named and source.model is None:
        raise ConfigError(
            f"{place} is a file and does not name its model; give it as --initial-checkpoint, with --model"
        )
    open_choice = named or (config.model == DEFAULT_MODEL and config.model_kwargs is None)
    if source.model and source.model != config.model and not open_choice:
        if source.file != Path(place):
            raise ConfigError(f"{place} holds weights of {source.model}, not of {config.model}; leave out --model")
        source = Source(place, source.file)  # what lies beside the file describes another one
    config = replace(config, pretrained=False, initial_checkpoint=place)
    if source.model is None:
        return config, source
    kwargs = {**source.model_kwargs, **(config.model_kwargs or {})}
    return replace(config, model=source.model, model_kwargs=kwargs), source


def _from_disk(place: str) -> Source:
    path = Path(place).expanduser()
    if not path.exists():
        raise ConfigError(f"there is no file or folder {place} here ({Path.cwd()}); name weights that you have")
    described = path if path.is_dir() else path.parent
    kind = next((name for name in (_RUN, _TIMM) if (described / name).is_file()), None)
    if not path.is_dir():
        try:
            return _described(place, path, described / kind) if kind else Source(place, path)
        except ConfigError:  # what lies beside a file need not be about it
            return Source(place, path)
    if kind is None:
        raise ConfigError(
            f"{place} has neither timm's {_TIMM} nor a run's {_RUN}; name a file of weights, and its model with --model"
        )
    return _described(place, _weights_in(path, kind), path / kind)


def _weights_in(folder: Path, kind: str) -> Path:
    """The file of weights in a folder: by the names that timm and the Hub give it, or the only one."""
    if kind == _RUN and not (folder / _WEIGHTS).exists():
        raise ConfigError(f"{folder} has no {_WEIGHTS} yet; finish the run: {resume_command(folder)}")
    usual = [folder / name for name in _USUAL if (folder / name).exists()]
    found = usual[:1] or sorted(path for path in folder.iterdir() if path.name.endswith(_SUFFIXES))
    if len(found) != 1:
        which = f"several files of weights ({listing(path.name for path in found)})" if found else "no file of weights"
        raise ConfigError(f"{folder} has {which}; name one as --initial-checkpoint")
    return found[0]


def _described(place: str, file: Path, description: Path) -> Source:
    """Weights, with what a run's run.json or timm's config.json says of them."""
    try:
        record = parse_json(read_text(description))
        check(record, MAPPING)
        if description.name == _RUN:
            name, kwargs, settings = record.get("model"), record.get("model_kwargs"), record.get("evaluation")
            kwargs = without_starting_weights(kwargs) if isinstance(kwargs, dict) else kwargs
        else:
            name, kwargs, settings = (
                record.get("architecture"),
                record.get("model_args"),
                record.get("pretrained_cfg", record),
            )
        check(name, TEXT, "the model's name")
        for value in (kwargs, settings):
            check({} if value is None else value, MAPPING, "what it says of the model")
    except (OSError, Malformed) as error:
        raise ConfigError(
            f"{description} does not say what model it is of ({first_line(error)}); name a file"
        ) from None
    return _known(place, file, name, kwargs or {}, settings or {})


def _from_hub(place: str) -> Source:
    name = place.removeprefix(HUB)
    require_reachable(place, name, (_TIMM,))
    try:
        settings, model, kwargs = timm.models.load_model_config_from_hf(name)
    except Exception as error:  # whatever the hub's client may raise
        raise ConfigError(f"{place} cannot be had ({first_line(error)}); name weights that you have") from None
    return _known(place, None, model, kwargs or {}, settings)


def _known(place: str, file: Path | None, model: str, kwargs: dict[str, Any], settings: dict[str, Any]) -> Source:
    refuse_further_weights(kwargs, place)
    # A head is made for the data's classes, whatever the weights have.
    kwargs = {key: value for key, value in kwargs.items() if key not in ("num_classes", "img_size")}
    return Source(place, file, model, kwargs, settings)
