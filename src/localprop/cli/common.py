"""What several commands do with their flags."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from localprop.errors import ConfigError
from localprop.settings.flat import from_flat
from localprop.settings.trust import require_typed
from localprop.settings.values import read_yaml


def take_config_files(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes `-c FILE` out of the flags; returns the other flags, and the files."""
    rest, files, words = [], [], iter(argv)
    for word in words:
        flag, equals, path = word.partition("=")
        if flag not in ("-c", "--config"):
            rest.append(word)
            continue
        files.append(path if equals else next(words, ""))
        if not files[-1]:
            raise ConfigError("-c needs a YAML file of settings")
    return rest, files


def with_files(config: Any, files: list[str], words: Sequence[str]) -> Any:
    """A config with the settings of `-c` files over it.

    Args:
        config: the settings that the files change.
        files: YAML files; a later one wins.
        words: the command line, which decides what a file may not.
    """
    for file in files:
        settings = read_yaml(Path(file))
        config = from_flat(settings, file, config)
        require_typed(settings, file, words)
    return config


def typed(argv: Sequence[str], files: list[str]) -> set[str]:
    """The settings that flags and `-c` files name, whatever they say of them."""
    flags = {word.partition("=")[0].removeprefix("--") for word in argv if word.startswith("--")}
    keys = {str(key) for file in files for key in read_yaml(Path(file))}
    return {name.replace("-", "_") for name in flags | keys}


def named_plugin(folder: Path, named: Path | None, words: Sequence[str]) -> Path | None:
    """The plugin of a run, if the command line names it; see `require_plugin`."""
    from localprop.runs.description import require_plugin

    note = require_plugin(folder, named, words)
    if note and "RANK" not in os.environ:  # of several processes, the one that started them has shown it
        show_notes([note])
    return named


def show_notes(lines: Sequence[str]) -> None:
    """Writes lines for the user to standard error."""
    for line in lines:
        print(f"localprop: {line}", file=sys.stderr)
