"""Which layer of a model is at work, told while the model runs: in forward by its modules, in backward by its graph."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from localprop.tracing.units import Unit

_AccumulateGrad = "torch::autograd::AccumulateGrad"


class Layers:
    """Tells the layer at work.

    In forward it is the innermost module that runs, or the unit, where that computes something itself. In backward it
    is the layer in whose forward autograd made the node that runs now: nodes are numbered in the order in which they
    are made.
    """

    def __init__(self) -> None:
        self._running: list[str] = []
        # The layer at work from each node of autograd's on.
        self._nodes: list[int] = []
        self._makers: list[str | None] = []
        self._parameters: dict[int, str] = {}

    @contextmanager
    def following(self, modules: Iterable[tuple[str, nn.Module]]) -> Iterator[None]:
        """Follows modules, each under the name that is given with it, and the units that run inside."""
        call = Unit.__call__

        def run(unit: Unit, *args: Any, **kwargs: Any) -> Tensor:
            self._enter(unit.name)
            try:
                return call(unit, *args, **kwargs)
            finally:
                self._leave()

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(Unit, "__call__", run))
            for name, module in modules:
                for leaf, parameter in module.named_parameters(recurse=False):
                    self._parameters[id(parameter)] = f"{name}.{leaf}".removeprefix(".")
                before = module.register_forward_pre_hook(self._entering(name))
                after = module.register_forward_hook(lambda *_: self._leave(), always_call=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
            yield

    def at_work(self) -> str | None:
        """The layer at work; None outside of all of them, such as in an optimizer's step."""
        if self._running:
            return self._running[-1]
        node = torch._C._current_autograd_node()
        if node is None:
            return None
        if node.name() == _AccumulateGrad:
            return self.parameter(node.variable)  # type: ignore[attr-defined]
        made = bisect_right(self._nodes, node._sequence_nr()) - 1
        return self._makers[made] if made >= 0 else None

    @property
    def running(self) -> bool:
        """Whether a layer's forward runs, for the first time or, in backward, again."""
        return bool(self._running)

    def parameter(self, parameter: Tensor) -> str | None:
        """The name of a parameter; None for one that none of the modules has."""
        return self._parameters.get(id(parameter))

    def _entering(self, name: str) -> Callable[..., None]:
        return lambda *_: self._enter(name)

    def _enter(self, name: str) -> None:
        self._running.append(name)
        self._note()

    def _leave(self) -> None:
        self._running.pop()
        self._note()

    def _note(self) -> None:
        self._nodes.append(torch._C._autograd._get_sequence_nr())
        self._makers.append(self._running[-1] if self._running else None)
