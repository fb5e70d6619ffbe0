"""Reads flags into a dataclass; any mistake in them gets one line."""

import contextlib
import dataclasses
import io
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import tyro

from localprop.errors import ConfigError, shown, suggestion
from localprop.settings.flat import to_flat
from localprop.settings.values import Pairs, read_pairs

_KINDS = {int: "a whole number", float: "a number", bool: "auto, True or False"}


def parse(kind: Any, command: str, argv: Sequence[str], default: Any = tyro.MISSING) -> Any:
    """Reads flags into a dataclass.

    Args:
        kind: the dataclass; its fields are the flags.
        command: its name, for messages.
        argv: the words after it.
        default: holds the flags' defaults, where they are not those of `kind`.

    Raises:
        ConfigError: an unknown flag, or a value that it does not accept or that is missing.
    """
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            options, unknown = tyro.cli(
                kind,
                prog=f"localprop {command}",
                args=argv,
                **({} if default is tyro.MISSING else {"default": default}),
                config=(tyro.conf.OmitArgPrefixes,),
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        # tyro has shown a box; it offers no way to ask what is wrong.
        if reason := _problem(kind, argv):
            raise ConfigError(reason) from None
        raise ConfigError(f"{_first_sentence(output.getvalue())}; see localprop {command} --help") from None
    if unknown:
        flags = ["--" + name.replace("_", "-") for name in to_flat(options)]
        hint = suggestion(unknown[0].partition("=")[0], flags)
        hint = hint if hint.startswith("did") else f"see localprop {command} --help"
        raise ConfigError(f"{command} has no option {unknown[0]!r}; {hint}")
    return options


def _problem(kind: Any, argv: Sequence[str]) -> str | None:
    """What is wrong with the first flag that cannot be read; None where nothing is found."""
    hints = {f"--{f.name.replace('_', '-')}": f for f in _fields(kind)}
    words, given = list(argv), 0
    while words:
        flag, equals, value = words.pop(0).partition("=")
        field = hints.get(flag.replace("_", "-")) if flag.startswith("--") else None
        if field is None:
            given += not flag.startswith("-")
            continue
        hint = _plain(field.type)
        if hint is bool and not _is_optional(field.type):
            continue
        values = [value] if equals else []
        while not equals and words and not words[0].startswith("--") and (_is_many(field.type) or not values):
            values.append(words.pop(0))
        if not values and not _is_many(field.type):
            return f"{flag} needs a value: {_expected(field.type)}"
        for value in values:
            if not _fits(value, field.type):
                return f"{flag} is {shown(value)}; {_remedy(value, field.type)}"
    # Without a default are those fields alone that are written without a flag.
    missing = [f.name.upper() for f in hints.values() if f.default is f.default_factory is dataclasses.MISSING]
    return f"{missing[given]} is missing; write it without a flag" if given < len(missing) else None


def _fields(kind: Any) -> Iterator[dataclasses.Field[Any]]:
    for field in dataclasses.fields(kind):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from _fields(field.type)
        else:
            yield field


def _bare(hint: Any) -> Any:
    """A type without its annotations."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _plain(hint: Any) -> Any:
    """A type without its annotations, and without None."""
    hint = _bare(hint)
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    return options[0] if _is_optional(hint) else hint


def _is_optional(hint: Any) -> bool:
    return type(None) in typing.get_args(_bare(hint))


def _is_many(hint: Any) -> bool:
    return hint == Pairs or typing.get_origin(_plain(hint)) is tuple


def _choices(hint: Any) -> list[str]:
    kind = _plain(hint)
    return [str(word) for word in typing.get_args(kind)] if typing.get_origin(kind) is Literal else []


def _fits(value: str, hint: Any) -> bool:
    kind = _plain(hint)
    if _is_optional(hint) and value == "None":
        return True
    if choices := ["auto", "True", "False"] if kind is bool else _choices(hint):
        return value in choices
    try:
        if hint == Pairs:
            read_pairs([value])
        elif kind in (int, float):
            kind(value)
    except ValueError:
        return False
    return True


def _expected(hint: Any) -> str:
    if choices := _choices(hint):
        return " or ".join([*filter(None, [", ".join(choices[:-1])]), choices[-1]])
    return "KEY=VALUE" if hint == Pairs else _KINDS.get(_plain(hint), "a word")


def _remedy(value: str, hint: Any) -> str:
    close = suggestion(value, _choices(hint)) if _choices(hint) else ""
    return close if close.startswith("did") else f"it must be {_expected(hint)}"


def _first_sentence(box: str) -> str:
    """What stands in the first part of a box that tyro has drawn, as one line."""
    words: list[str] = []
    for line in box.splitlines():
        text = line.strip("│|╭╮╰╯─ \t")
        if words and not text:
            break
        words += text.split() if line.startswith(("│", "|")) else []
    return " ".join(words) or "the flags cannot be read"
