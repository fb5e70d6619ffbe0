"""Options of methods and heads: what each of them takes, and what is wrong with those that are given."""

import inspect
from collections.abc import Callable
from numbers import Real
from typing import Any

from localprop.errors import ConfigError, suggestion


def options_of(entry: Callable[..., Any]) -> dict[str, Any]:
    """The options of a method or a head, each with its default."""
    parameters = inspect.signature(entry).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def check_options(noun: str, name: str, entry: Callable[..., Any], options: dict[str, Any]) -> None:
    """Raises a ConfigError where there is no such option, or a number or a switch is something else.

    Args:
        noun: what the entry is, such as "method".
        name: its name.
        entry: a class whose parameters with defaults are its options.
        options: those that are given.
    """
    known = options_of(entry)
    for option, value in options.items():
        if option not in known:
            hint = suggestion(option, known) if known else "it has none"
            raise ConfigError(f"{noun} {name} has no option {option!r}; {hint}")
        kind = type(known[option])
        if kind is bool and not isinstance(value, bool):
            raise ConfigError(f"{noun} {name}: {option} is {value!r}; it is True or False")
        if kind is float and not isinstance(value, Real):
            raise ConfigError(f"{noun} {name}: {option} is {value!r}; it is a number")
        if kind is int and (isinstance(value, bool) or not isinstance(value, int)):
            raise ConfigError(f"{noun} {name}: {option} is {value!r}; it is a whole number")
