"""The generated code of a part of a traced forward."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any, Literal, NamedTuple

Handed = Literal["same", "count", "rows", "mixed"]
"""How a value that is handed along depends on the batch: not at all; as a whole number that is so many for each image;
as a tensor with a row for each image; or in another way."""


@dataclass(frozen=True)
class Code:
    """The generated code of one segment.

    Attributes:
        function: (backbone, features, *values read) -> output, or (output, values written).
        reads: names of the values that earlier segments hand along.
        writes: names of the values that it hands along.
        handed: how each of these values depends on the batch.
        source: of the function.
        scope: what names in it stand for.
    """

    function: Callable[..., Any]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    source: str = field(default="", repr=False)
    scope: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    handed: dict[str, Handed] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def generate(
        cls,
        source: str,
        scope: dict[str, Any],
        reads: tuple[str, ...],
        writes: tuple[str, ...],
        handed: dict[str, Handed],
    ) -> "Code":
        """Code from the source of a function called `forward`, and what its names stand for."""
        names = dict(scope)
        exec(source, names)
        return cls(names["forward"], reads, writes, source, scope, handed)

    def __reduce__(self) -> tuple[Any, ...]:
        # A generated function cannot be pickled, but generated again. Modules such as torch are imported again.
        scope = {name: _Module(v.__name__) if isinstance(v, ModuleType) else v for name, v in self.scope.items()}
        return _regenerate, (self.source, scope, self.reads, self.writes, self.handed)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Code":
        return self  # it holds no tensors


class _Module(NamedTuple):
    """Stands for a Python module in a pickle."""

    name: str


def _regenerate(source: str, scope: dict[str, Any], *handed_along: Any) -> Code:
    whole = {name: import_module(v.name) if isinstance(v, _Module) else v for name, v in scope.items()}
    return Code.generate(source, whole, *handed_along)
