"""Settings as a flat mapping, for YAML and results, and as flags; and back."""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from localprop.errors import ConfigError, suggestion
from localprop.settings.config import TrainConfig
from localprop.settings.values import read_pairs, typed
from localprop.system.reading import Malformed, require_once

# Settings that say where and how a run is computed more than what it is, and where each of them is free:
#   resume     it may change when the run is resumed
#   config     the run's config.yaml leaves it out
#   record     the result of a suite's run leaves it out
#   processes  it may differ between the processes of a run: each machine has its own
_FREE = {
    "output": ("resume", "record"),
    "experiment": ("record",),
    "resume": ("resume", "config", "record"),
    "parallel": ("resume", "config"),
    "nproc": ("resume", "config", "processes"),
    "trace": ("resume", "config", "record"),
    "device": ("resume", "record", "processes"),
    "workers": ("resume", "record", "processes"),
    "data_dir": ("resume", "record", "processes"),
    "download": ("resume", "record", "processes"),
    "steps": ("resume", "config"),
    "checkpoint_steps": ("resume", "record"),
    "checkpoint_hist": ("resume", "record"),
    "val_interval": ("resume",),
    "compile": ("resume",),
    "deterministic": ("resume",),
    "cuda_graphs": ("resume", "record"),
    "offload_optimizer": ("resume",),
    "offload_boundaries": ("resume",),
}


def free(where: Literal["resume", "config", "record", "processes"]) -> set[str]:
    """The settings that are free there; see `_FREE`."""
    return {name for name, places in _FREE.items() if where in places}


def to_flat(config: Any) -> dict[str, Any]:
    """The settings as one flat dict of YAML-friendly values, keyed by flag names with underscores."""

    def plain(value: Any) -> Any:
        return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value

    result: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        result |= to_flat(value) if dataclasses.is_dataclass(value) else {f.name: plain(value)}
    return result


def to_flags(config: TrainConfig, always: Collection[str] = ()) -> list[str]:
    """The flags of `localprop train` that give these settings; defaults are left out, but for those in `always`.

    With a budget the method is named too: without one, `train` would take exact training. Learning rates are, where
    training starts from trained weights: without them, it would take others.
    """
    default, words = to_flat(TrainConfig()), []
    named = {*always, "method"} if config.local.budget else {*always}
    named |= {"lr", "backbone_lr_scale"} if config.backbone.starts_trained else set()
    for name, value in to_flat(config).items():
        if value == default[name] and name not in named:
            continue
        if isinstance(value, bool) and isinstance(default[name], bool):
            words.append(f"--{'' if value else 'no-'}{name.replace('_', '-')}")
        else:
            words += flag_words(name, value)
    return words


def flag_words(name: str, value: Any) -> list[str]:
    """The flag that gives a setting this value, and its words; the setting is no switch."""
    words = [f"--{name.replace('_', '-')}"]
    if isinstance(value, dict):
        for key, item in value.items():
            word = f"{key}={item}"
            words.append(word if isinstance(item, str) and read_pairs([word])[key] == item else f"{key}={item!r}")
        return words
    return words + ([str(item) for item in value] if isinstance(value, list) else [str(value)])


def from_flat(settings: dict[str, Any], source: str, base: Any = None) -> Any:
    """Builds a config from flat `settings`, over `base` (default: the defaults of training).

    Raises:
        ConfigError: an unknown key or an impossible value; the line names `source`.
    """
    base = base or TrainConfig()
    settings = plain_keys(settings, source)
    known = to_flat(base)
    for key in settings:
        if key not in known:
            raise ConfigError(f"{source}: unknown setting {key!r}; {suggestion(key, known)}")
    try:
        return _with(base, settings, source)
    except ConfigError as error:
        raise error if source in str(error) else ConfigError(f"{source}: {error}") from None


def plain_keys(settings: dict[str, Any], source: str) -> dict[str, Any]:
    """The settings, keyed by flag names with underscores: a file may write them as flags.

    Raises:
        ConfigError: one of them is there twice.
    """
    try:
        require_once(str(key).replace("-", "_") for key in settings)
    except Malformed as error:
        raise ConfigError(f"{source}: {error}; remove one") from None
    return {str(key).replace("-", "_"): value for key, value in settings.items()}


def _with(base: Any, settings: dict[str, Any], source: str) -> Any:
    values = {}
    for f in dataclasses.fields(base):
        value = getattr(base, f.name)
        if dataclasses.is_dataclass(value):
            values[f.name] = _with(value, settings, source)
        elif f.name in settings:
            values[f.name] = typed(f.name, settings[f.name], f.type, source)
    try:
        return dataclasses.replace(base, **values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
