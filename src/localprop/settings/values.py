"""Values of settings: how a flag or a YAML file writes them, and what they become."""

import ast
import contextlib
import re
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from localprop.errors import ConfigError, shown
from localprop.system.reading import MIB, Malformed, parse_yaml, read_text


def read_pairs(words: list[str]) -> dict[str, Any]:
    """Reads key=value words, values as Python literals where they are some, as timm's flags do."""
    pairs = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"{word!r} is not key=value")
        try:
            pairs[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pairs[key] = value
    return pairs


def read_auto(word: str) -> bool | None:
    """Reads True, False (or as YAML writes them: true, false), or auto, which leaves the choice open and is None."""
    values = {"auto": None, "None": None, "True": True, "true": True, "False": False, "false": False}
    if word not in values:
        raise ValueError(f"{word!r} is not auto, True or False")
    return values[word]


def parse_bytes(text: str, flag: str = "") -> int:
    """Reads an amount of memory: 8GiB, 500MiB, 2G, or plain bytes. G and GB are GiB, as with `ulimit`.

    Args:
        text: the amount.
        flag: that gives it, for the message.

    Raises:
        ConfigError: it is no such amount.
    """
    # No more digits than exabytes have: floats end, and so does what Python reads as a number.
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d*)?)\s*(?:([kmgt])i?b?|b)?\s*", text, re.IGNORECASE | re.ASCII)
    if not match or not float(match[1]):
        raise ConfigError(f"{_named(text, flag)} is no number of bytes; write 8GiB or 500MiB")
    return int(float(match[1]) * 1024 ** (" kmgt".index(match[2].lower()) if match[2] else 0))


def parse_duration(text: str, flag: str = "") -> float:
    """Reads a time: 9m, 1h30m, 45s, or plain seconds; gives seconds.

    Args:
        text: the time.
        flag: that gives it, for the message.

    Raises:
        ConfigError: it is no such time.
    """
    match = re.fullmatch(r"(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s?)?", text.strip(), re.IGNORECASE)
    seconds = (
        sum(int(part or 0) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True)) if match else 0
    )
    if not seconds:
        raise ConfigError(f"{_named(text, flag)} is no time; write 9m or 1h30m")
    return float(seconds)


def _named(text: str, flag: str) -> str:
    return f"{flag} {shown(text)}" if flag else shown(text)


Pairs = Annotated[
    dict[str, Any] | None,
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="KEY=VALUE ...",
        instance_from_str=read_pairs,
        is_instance=lambda value: value is None or isinstance(value, dict),
        str_from_instance=lambda value: [f"{k}={v}" for k, v in (value or {}).items()],
    ),
    tyro.conf.arg(help_behavior_hint=""),
]
# Settings whose default depends on others: their help says how, and "(default: None)" would say nothing.
OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
OptionalFloat = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
OptionalStr = Annotated[str | None, tyro.conf.arg(metavar="STR", help_behavior_hint="")]
AutoBool = Annotated[
    bool | None,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="{auto,True,False}",
        instance_from_str=lambda words: read_auto(words[0]),
        is_instance=lambda value: value is None or isinstance(value, bool),
        str_from_instance=lambda value: ["auto" if value is None else str(value)],
    ),
    tyro.conf.arg(help_behavior_hint=""),
]
OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
OptionalNames = Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="NAME ...", help_behavior_hint="")]


def typed(key: str, value: Any, hint: Any, source: str) -> Any:
    """Converts one YAML value to the type its field is annotated with (YAML reads 1e-3 as a string)."""
    if hint == AutoBool:
        if value == "auto":
            return None
        if not isinstance(value, bool | None):
            raise ConfigError(f"{source}: {key} is {shown(value)}, expected auto or true or false")
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    union = typing.get_args(hint) if type(None) in typing.get_args(hint) else (hint,)
    names = []
    for option in union:
        kind = typing.get_origin(option) or option
        if kind is Literal:
            words = typing.get_args(option)
            names += [repr(word) for word in words]
            if isinstance(value, bool) and "on" in words:
                value = "on" if value else "off"  # the words that YAML has read
            if value in words:
                return value
        elif option is type(None):
            if value is None:
                return None
        else:
            names.append(kind.__name__)
            if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
                with contextlib.suppress(ValueError, OverflowError):
                    return float(value)
            elif kind is tuple and isinstance(value, (list, tuple)):
                return tuple(str(item) for item in value)
            elif kind in (str, Path) and isinstance(value, (str, int, Path)):
                if "\0" not in str(value):
                    return kind(str(value))
            elif kind is dict:
                if isinstance(value, dict) and all(isinstance(name, str) for name in value):
                    return value
            elif type(value) is kind:
                return value
    raise ConfigError(f"{source}: {key} is {shown(value)}, expected {' or '.join(names)}")


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a flat YAML file of settings.

    Raises:
        ConfigError: the file is missing or not a mapping of settings.
    """
    try:
        settings = parse_yaml(read_text(path, MIB))
    except OSError as error:
        raise ConfigError(f"cannot read settings from {path}: {error.strerror}") from None
    except Malformed as error:
        raise ConfigError(f"{path}: {error}; write one 'key: value' per line") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} is not a mapping; write one 'key: value' per line")
    return settings
