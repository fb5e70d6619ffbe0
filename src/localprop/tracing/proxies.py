"""Traced values: nodes of a graph that also have values on fake tensors, one for each of two batch sizes."""

import operator
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx
from torch.fx.proxy import TraceError

BATCHES = {"value": 2, "twin": 3}  # key of a node's meta: size of the batch it is computed for


class ConcreteProxy(fx.Proxy):
    """A traced value that also has concrete ones."""

    def _fixed(self, function: Callable[[Any], Any]) -> Any:
        """What Python code needs as a plain number: possible if it is the same for every batch size."""
        first, *rest = (function(self.node.meta[key]) for key in BATCHES)
        if any(other != first for other in rest):
            raise TraceError("its control flow depends on the size of the batch")
        return first

    def __getattr__(self, name: str) -> Any:
        if not callable(getattr(self.node.meta["value"], name)):
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return super().__getattr__(name)

    def __setitem__(self, index: Any, item: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, item), {})

    def __iter__(self) -> Iterator[Any]:
        return iter([self[i] for i in range(len(self))])  # type: ignore[index]

    def __bool__(self) -> bool:
        return self._fixed(bool)

    def __len__(self) -> int:
        return self._fixed(len)

    def __index__(self) -> int:
        return self._fixed(operator.index)

    def __int__(self) -> int:
        return self._fixed(int)

    def __float__(self) -> float:
        return self._fixed(float)


def _in_place(name: str) -> Callable[[fx.Proxy, Any], Any]:
    function = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in ("iadd", "isub", "imul", "itruediv"):  # torch.fx turns x += y into x = x + y
    setattr(ConcreteProxy, f"__{_name}__", _in_place(_name))
