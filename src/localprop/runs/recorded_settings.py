"""config.yaml of a run folder: the settings of a run, and what they do not decide."""

from pathlib import Path
from typing import Any

import yaml

from localprop.errors import CheckpointError, ConfigError
from localprop.settings.config import TrainConfig
from localprop.settings.earlier import settings_as_recorded
from localprop.settings.flat import free, from_flat, plain_keys, to_flat
from localprop.settings.values import read_yaml

CONFIG = "config.yaml"


def settings_text(config: TrainConfig) -> str:
    """The content of config.yaml."""
    settings = to_flat(config)
    for name in free("config"):
        del settings[name]
    return yaml.safe_dump(settings, sort_keys=False)


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
    return from_flat({**settings_as_recorded(settings), "plugin": plugin, "download": False}, str(folder / CONFIG))


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
