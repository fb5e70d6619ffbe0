"""What a file may not choose: which code runs, which weights are loaded, and which other places are written to.

A file of settings, a suite or a run folder may be a stranger's. Only the command line, which the user types, may choose
these.
"""

import inspect
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from localprop.errors import ConfigError, listing, shown
from localprop.settings.config import PLACES
from localprop.settings.flat import flag_words
from localprop.system.commands import command, without_flag

# Which of timm's arguments say where the weights are that training starts from.
_START = ("checkpoint_path", "cache_dir")
DESCRIPTIONS = ("pretrained_cfg", "pretrained_cfg_overlay")
"""Arguments of `timm.create_model` that describe pretrained weights."""
_SOURCES = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load")


def require_typed(settings: dict[str, Any], source: str, words: Sequence[str], typed: Sequence[str] = ()) -> None:
    """Refuses what a file may not choose, unless the command line decides it.

    Args:
        settings: flat settings as they were read.
        source: the file, for the message.
        words: the command line, from the command's name on.
        typed: names of settings that it decides beside its flags.

    Raises:
        ConfigError: the line says which command means it.
    """
    known = {*typed, *(word.partition("=")[0][2:].replace("-", "_") for word in words if word.startswith("--"))}
    found = [item for item in _undecided(settings) if item[0] not in known]
    if found:
        name, value, what = found[0]
        raise ConfigError(
            f"{source}: a file may not choose {what} ({name}: {value}); if you want that, type: "
            f"{command(*_typed(words, found))}"
        )


def require_plugins(plugins: Sequence[Path | None], named: Sequence[Path], source: str, words: Sequence[str]) -> None:
    """Refuses plugins of a suite that the command line does not name.

    Raises:
        ConfigError: the line says which command names them.
    """
    known = {path.expanduser().resolve() for path in named}
    missing = dict.fromkeys(path for path in plugins if path and path.expanduser().resolve() not in known)
    if missing:
        rest, _ = without_flag(words, "--plugin")
        raise ConfigError(
            f"{source}: a file may not choose which code runs; if you trust {listing(missing)}, type: "
            f"{command(*rest, '--plugin', *named, *missing)}"
        )


def without_starting_weights(model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `timm.create_model` that give the same model, without weights that it would start from."""
    kept = {name: value for name, value in model_kwargs.items() if name not in _START}
    for name in set(DESCRIPTIONS) & set(kept):
        if isinstance(kept[name], dict):
            kept[name] = {key: value for key, value in kept[name].items() if key not in _SOURCES}
    return kept


def refuse_further_weights(model_kwargs: dict[str, Any], source: str) -> None:
    """Raises a ConfigError where the arguments of a model that come with weights name other weights, or a place."""
    for name, value in model_kwargs.items():
        if _chooses_weights(name, value):
            raise ConfigError(f"{source}: weights may not choose other weights ({name}: {shown(value)}); remove that")


def _typed(words: Sequence[str], found: Sequence[tuple[str, Any, str]]) -> list[str]:
    """The words of a command, with the settings that were found."""
    result = list(words)
    for name, value, _ in found:
        if words[0] == "bench" and name in ("model", "model_kwargs", "initial_checkpoint"):
            rest, pairs = without_flag(result, "--set")
            result = [*rest, "--set", *pairs, f"{name}={value!r}"]
        else:
            result += flag_words(name, value)
    return result


def _undecided(settings: dict[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Name and value of each setting that is not a file's to decide, and what it decides."""
    settings = {str(name).replace("-", "_"): value for name, value in settings.items() if value is not None}
    if "plugin" in settings:
        yield "plugin", settings["plugin"], "which code runs"
    if "resume" in settings:
        yield "resume", settings["resume"], "which run is resumed"
    if "initial_checkpoint" in settings:
        yield "initial_checkpoint", settings["initial_checkpoint"], "which weights are loaded"
    if str(settings.get("model", "")).startswith(PLACES):
        yield "model", settings["model"], "which weights are loaded"
    kwargs = settings.get("model_kwargs")
    if isinstance(kwargs, dict) and any(_chooses_weights(*item) for item in kwargs.items()):
        yield "model_kwargs", kwargs, "which weights are loaded"
    written = ["output", "experiment"] + (["data_dir"] if settings.get("download") else [])
    for name in written:
        if name in settings and _leaves(str(settings[name])):
            yield name, settings[name], "where results are written" if name != "data_dir" else "where data are written"
    for name in ("json", "picture"):
        if name in settings:
            yield name, settings[name], "which file is written"


def _chooses_weights(name: str, value: Any) -> bool:
    return _names_a_place(value) or name in _factory_arguments()


@cache
def _factory_arguments() -> set[str]:
    """What timm's factory and builder accept beside the arguments of a model: which weights, and how to read them."""
    import timm  # only here: reading flags and files of settings needs no torch
    from timm.models import build_model_with_cfg

    names = {name for f in (timm.create_model, build_model_with_cfg) for name in inspect.signature(f).parameters}
    return names - {"kwargs", "scriptable", "exportable", "no_jit"}  # these three only choose how layers are written


def _leaves(place: str) -> bool:
    path = Path(place)
    return path.is_absolute() or ".." in path.parts or place.startswith("~")


def _names_a_place(value: Any) -> bool:
    """Whether an argument of a model, or something in it, is a path or an address; timm's own words are neither."""
    if isinstance(value, dict):
        return any(_names_a_place(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(_names_a_place(item) for item in value)
    return isinstance(value, str) and any(mark in value for mark in "/\\:~")
