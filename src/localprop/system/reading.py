"""Reading files that may be a stranger's: JSON and YAML of bounded size and depth, and checks of what they say."""

import json
import math
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from localprop.errors import shown

MIB = 2**20
_MOST_VALUES = 100_000  # of YAML, once aliases are written out
_DEEPEST = 50


class Malformed(ValueError):
    """What a file says cannot be right; the text says where and why, without the file's name."""


@dataclass(frozen=True)
class Kind:
    """A kind of values: what it is called in a message, and whether a value is of it."""

    name: str
    holds: Callable[[Any], bool]


def _whole(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < 2**63


ANY = Kind("anything", lambda value: True)
NULL = Kind("null", lambda value: value is None)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a text", lambda value: isinstance(value, str) and "\0" not in value)
COUNT = Kind("a whole number of at least 0", lambda value: _whole(value, 0))
WHOLE = Kind("a whole number", lambda value: type(value) is int)
POSITIVE = Kind("a whole number of at least 1", lambda value: _whole(value, 1))
NUMBER = Kind("a number", lambda value: type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value))
LOSS = Kind("a number", lambda value: isinstance(value, float) or NUMBER.holds(value))
"""NaN and infinity included: with a loss scale, a step whose loss overflows is skipped and recorded."""
AMOUNT = Kind("a number of at least 0", lambda value: NUMBER.holds(value) and value >= 0)
PERCENT = Kind("a number from 0 to 100", lambda value: NUMBER.holds(value) and 0 <= value <= 100)
MAPPING = Kind("a mapping", lambda value: isinstance(value, dict))


def check(value: Any, shape: Any, place: str = "") -> None:
    """Checks what was read.

    Args:
        value: of JSON or YAML.
        shape: a `Kind`; a tuple of a shape and NULL, where it may be null; a list with the shape of each element; or a
            dict with the shape of each key, one that ends with "?" being optional. More keys may be there.
        place: what the value is called in a message.

    Raises:
        Malformed: it is something else.
    """
    if isinstance(shape, tuple):
        if value is not None or NULL not in shape:
            check(value, shape[0], place)
    elif isinstance(shape, Kind):
        if not shape.holds(value):
            raise Malformed(f"{_called(place)} is {_described(value)}, expected {shape.name}")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise Malformed(f"{_called(place)} is {_described(value)}, expected a list")
        for i, item in enumerate(value):
            check(item, shape[0], f"{place}[{i}]")
    else:
        if not isinstance(value, dict):
            raise Malformed(f"{_called(place)} is {_described(value)}, expected a mapping")
        for key, inner in shape.items():
            name = key.removesuffix("?")
            if name in value:
                check(value[name], inner, f"{place}.{name}" if place else name)
            elif name == key:
                raise Malformed(f"{f'{place}.{name}' if place else name} is missing")


def read_text(path: Path, most: int = 64 * MIB) -> str:
    """A file's text, of at most so many bytes.

    Raises:
        OSError: it is not there, or cannot be read.
        Malformed: it is no regular file, too long, or no UTF-8.
    """
    require_regular(path)
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise Malformed(f"it is longer than {most // MIB} MiB")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise Malformed("it is no text in UTF-8") from None


def require_once(names: Iterable[str], where: str = "") -> None:
    """Raises a `Malformed` where a name is there twice."""
    known: set[str] = set()
    for name in names:
        if name in known:
            raise Malformed(f"{where}the key {shown(name, 40)} is there twice")
        known.add(name)


def require_regular(path: Path) -> None:
    """Checks that reading a file ends: that it is no device, and no pipe to which nobody writes.

    Raises:
        OSError: it is not there.
        Malformed: it is no regular file.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise Malformed("it is no regular file")


def parse_json(text: str) -> Any:
    """What a JSON text says.

    Raises:
        Malformed: it is not JSON, nested too deep, or has a key twice.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_repetition)
        _require_shallow(value)
        return value
    except RecursionError:
        raise Malformed("it is nested too deep") from None
    except ValueError as error:
        raise error if isinstance(error, Malformed) else Malformed("it is no JSON") from None


def parse_yaml(text: str) -> Any:
    """What a YAML text says, as plain values.

    Raises:
        Malformed: it is not YAML, nested too deep, has a key twice, or comes to too much once aliases are written out.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {}, 0)
        return loader.construct_document(node)
    except RecursionError:
        raise Malformed("it is nested too deep") from None
    except Malformed:
        raise
    except Exception as error:  # PyYAML's constructors let through what int, datetime and others raise
        mark = getattr(error, "problem_mark", None)
        raise Malformed(f"line {mark.line + 1} is not valid YAML" if mark else "it is not valid YAML") from None


def _measure(node: yaml.Node, known: dict[int, int | None], depth: int) -> int:
    """Checks a YAML node, and gives the number of values in it once aliases are written out."""
    line = node.start_mark.line + 1
    if depth > _DEEPEST:
        raise Malformed(f"line {line} is nested too deep")
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise Malformed(f"line {line} contains itself")
        return size
    known[id(node)] = None
    size = 1
    if isinstance(node, yaml.MappingNode):
        require_once((key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)), f"line {line}: ")
        children = [child for pair in node.value for child in pair]
    else:
        children = node.value if isinstance(node, yaml.SequenceNode) else []
    for child in children:
        size += _measure(child, known, depth + 1)
        if size > _MOST_VALUES:
            raise Malformed(f"it has more than {_MOST_VALUES} values once its aliases are written out")
    known[id(node)] = size
    return size


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    require_once(name for name, _ in pairs)
    return dict(pairs)


def _require_shallow(value: Any) -> None:
    """Raises a Malformed where a value of JSON is nested too deep for those who go through it."""
    level = [value]
    for _ in range(_DEEPEST):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list))]
        level = [item for items in inner for item in items]
        if not level:
            return
    raise Malformed("it is nested too deep")


def _called(place: str) -> str:
    return place or "what it says"


def _described(value: Any) -> str:
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "a mapping"
    return shown(value, 40)
