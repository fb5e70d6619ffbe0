"""Nested values as tensors and JSON, and back: what checkpoints hold, and what processes send each other."""

import math
from typing import Any

import torch
from torch import Tensor

from localprop.errors import CheckpointError, first_line
from localprop.system.reading import Malformed

KINDS = "dicts with str or int keys, lists, tuples, None, bool, int, float, str, torch.dtype and torch.Size"
"""What a nested value may be made of, beside tensors."""


class Unknown(TypeError):
    """A value of another kind; the text names its type and place."""


def split(value: Any, place: str, tensors: dict[str, Tensor] | None) -> Any:
    """Takes a nested value apart.

    Args:
        value: dicts, lists and tuples, nested at will, of tensors and `KINDS`.
        place: what the value is called; the tensors in it are named by their place.
        tensors: gets the tensors; None where there may be none.

    Returns:
        The rest, as JSON. What JSON lacks becomes an object whose only key starts with "$".

    Raises:
        Unknown: something else is in it.
    """
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):  # made of others, such as a quantized one
        names, context = value.__tensor_flatten__()
        inner = {name: getattr(value, name) for name in names}
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        description = (kind, inner, context, value.shape, value.stride())
        return {"$wrapper": [split(item, place, tensors) for item in description]}
    if isinstance(value, Tensor) and tensors is not None:
        while place in tensors:  # {"a/b": ..., "a": {"b": ...}}, or the keys 0 and "0"
            place += "'"
        tensors[place] = value
        return {"$tensor": place}
    if isinstance(value, dict) and all(type(key) in (str, int) for key in value):
        items = [(key, split(item, f"{place}/{key}", tensors)) for key, item in value.items()]
        plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
        return dict(items) if plain else {"$dict": items}
    if type(value) in (list, tuple, torch.Size):
        entries = [split(item, f"{place}/{index}", tensors) for index, item in enumerate(value)]
        if isinstance(value, torch.Size):
            return {"$size": entries}
        return {"$tuple": entries} if isinstance(value, tuple) else entries
    if type(value) is float and not math.isfinite(value):
        return {"$float": repr(value)}
    if isinstance(value, torch.dtype):  # timm's Adafactor keeps one among its settings
        return {"$dtype": str(value).removeprefix("torch.")}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise Unknown(f"{type(value).__name__} at {place}")


def join(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Puts together what `split` took apart.

    Raises:
        Malformed: it is nothing that `split` gives.
        CheckpointError: it names a type of numbers, or a class of tensors, that is not known here.
    """
    try:
        return _join(value, tensors)
    except RecursionError:
        raise Malformed("it is nested too deep") from None
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError, AssertionError) as error:
        # What is described may be anything, and classes of tensors raise what they like.
        line = first_line(error)
        raise Malformed(f"a value in it cannot be put together ({type(error).__name__}: {line[:80]})") from None


def _join(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_join(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    match next(iter(value.items()), None):
        case ("$tensor", name):
            return tensors[name]
        case ("$wrapper", items):
            kind, *description = (_join(item, tensors) for item in items)
            return _wrapper_class(kind).__tensor_unflatten__(*description)
        case ("$size", items):
            return torch.Size(items)
        case ("$dict", items):
            return {key: _join(item, tensors) for key, item in items}
        case ("$tuple", items):
            return tuple(_join(item, tensors) for item in items)
        case ("$float", text):
            return float(text)
        case ("$dtype", name):
            return dtype_named(name)
    return {key: _join(item, tensors) for key, item in value.items()}


def dtype_named(name: Any) -> torch.dtype:
    """The type of numbers that torch calls so, such as "float32".

    Raises:
        CheckpointError: there is none.
    """
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"torch has no type of numbers called {str(name)[:40]!r}; the file is damaged")
    return found


def _wrapper_class(name: str) -> Any:
    """The class of a tensor made of others. Nothing is imported for it: a file does not choose what code runs."""
    classes: list[Any] = [Tensor]
    for kind in classes:
        if f"{kind.__module__}.{kind.__qualname__}" == name:
            return kind
        classes += kind.__subclasses__()
    library = name.partition(".")[0]
    raise CheckpointError(
        f"the checkpoint holds a {name}, which is not loaded; install {library} in the version that the run was "
        "started with"
    )
