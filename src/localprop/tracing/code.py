"""The generated code of a part of a traced forward."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Code:
    """The generated code of one segment.

    Attributes:
        function: (backbone, features, *values read) -> output, or (output, values written).
        reads: names of the values that earlier segments hand along.
        writes: names of the values that it hands along.
        source: of the function.
        scope: what names in it stand for.
    """

    function: Callable[..., Any]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    source: str = field(default="", repr=False)
    scope: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def generate(cls, source: str, scope: dict[str, Any], reads: tuple[str, ...], writes: tuple[str, ...]) -> "Code":
        """Code from the source of a function called `forward`, and what its names stand for."""
        names = dict(scope)
        exec(source, names)
        return cls(names["forward"], reads, writes, source, scope)

    def __reduce__(self) -> tuple[Any, ...]:
        # A generated function cannot be pickled, but generated again. Modules such as torch are imported again.
        scope = {name: _Module(v.__name__) if isinstance(v, ModuleType) else v for name, v in self.scope.items()}
        return _regenerate, (self.source, scope, self.reads, self.writes)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Code":
        return self  # it holds no tensors


class _Module(NamedTuple):
    """Stands for a Python module in a pickle."""

    name: str


def _regenerate(source: str, scope: dict[str, Any], reads: tuple[str, ...], writes: tuple[str, ...]) -> Code:
    whole = {name: import_module(v.name) if isinstance(v, _Module) else v for name, v in scope.items()}
    return Code.generate(source, whole, reads, writes)
