"""Traces the top level of a model's forward into a torch.fx graph: down to its blocks, or to the parts of a block.

Plain symbolic tracing fails on many real models: they branch on shapes, unpack tuples, build tensors from sizes.
The tracer here computes, beside every node it records, the node's value on fake tensors (shapes without data), once
for a batch of two images and once for three. Control flow then follows the values, tuples unpack, and each node's
shape is known when tracing ends. What differs between the two batches stays a node; every other number becomes a
constant. So the graph holds for any batch size, or tracing fails.
"""

import copy
import math
import sys
from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from timm.models import get_notrace_functions, is_notrace_module
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.proxy import TraceError

from localprop.tracing.blocks import container_classes, holds_blocks
from localprop.tracing.constants import KeepConstants
from localprop.tracing.proxies import BATCHES, ConcreteProxy
from localprop.tracing.reasons import why_not_opened, why_whole

_ROOT = "backbone"
# torch.fx does not see calls that make a tensor from numbers.
_FACTORIES = [torch.arange, torch.linspace, torch.tensor, torch.eye, torch.empty, torch.full, torch.ones, torch.zeros]
_FACTORIES += [torch.rand, torch.randint, torch.randn, torch.randperm]


class _Root(nn.Module):
    """Calls the model with one image: other arguments of its forward keep their defaults."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone = model

    def forward(self, image: Tensor) -> Any:
        return self.backbone(image)


def trace(
    model: nn.Module, size: tuple[int, ...], dtype: torch.dtype, mode: FakeTensorMode, opened: Set[str] = frozenset()
) -> tuple[fx.Graph, dict[str, str]]:
    """Traces `model(image)`.

    Args:
        model: the fake copy of a backbone, in train or eval mode.
        size: (channels, height, width) of the image.
        dtype: type of the image.
        mode: the mode that the copy belongs to.
        opened: names of the blocks whose own forward is traced too. What they call stays whole.

    Returns:
        A graph of calls to blocks and of the operations between them. `node.meta["value"]` is each node's fake
        value, `node.meta["mutated"]` the nodes whose tensors it writes in place, `node.meta["block"]` the name of
        the opened block that it is in, or None. Module names carry no prefix.

        And the parts that were to be traced inside and cannot be, which the graph calls as they are: why, by name.

    Raises:
        Exception: any, since it runs the model's own code.
    """
    for module in model.modules():
        # A checkpointed run of blocks would hide them; units checkpoint themselves (see `localprop.chain`).
        if hasattr(module, "grad_checkpointing"):
            module.grad_checkpointing = False  # type: ignore[assignment]
    for parameter in model.parameters():  # frozen ones too: they may be unfrozen later
        if parameter.is_floating_point():
            parameter.requires_grad_()
    with mode, torch.enable_grad():
        # Not leaves of autograd, so that the model may write to its input.
        images = {key: torch.empty(n, *size, dtype=dtype).requires_grad_().clone() for key, n in BATCHES.items()}
        tracer = _ConcreteTracer(images, model, opened)
        with tracer.recording(model):
            graph = tracer.trace(_Root(model))
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = node.target.removeprefix(_ROOT + ".")
    kept = {"placeholder", "output", "call_module"}
    graph.eliminate_dead_code(lambda node: node.op in kept or bool(node.meta.get("mutated")))
    return graph, tracer.whole


class _ConcreteTracer(fx.Tracer):
    def __init__(self, images: dict[str, Tensor], model: nn.Module, opened: Set[str]) -> None:
        none: Any = ()  # torch 2.14 declares a tuple of exactly one module
        super().__init__(autowrap_modules=none)
        self._images = images
        self._containers = container_classes(model)
        self._opened = opened
        self.whole: dict[str, str] = {}  # why parts are called as they are, by their name
        self._block: str | None = None  # the opened block that is being traced
        self._running = False  # inside a leaf, modules and functions behave as outside a trace
        self._context = _context()

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """Makes functions that must not be traced into nodes: timm's own list, math, and tensor factories."""
        arithmetic = [f for name, f in vars(math).items() if callable(f) and not name.startswith("_")]
        leaves = {id(f) for f in [*arithmetic, *get_notrace_functions()]}
        factories = {id(f) for f in _FACTORIES}
        classes = {base for module in model.modules() for base in type(module).__mro__}
        scopes = {sys.modules[cls.__module__] for cls in classes if cls.__module__ in sys.modules}
        with ExitStack() as stack:
            for scope in scopes | {torch, math}:
                for name, function in list(vars(scope).items()):
                    if id(function) in leaves or id(function) in factories:
                        recorder = self._recorder(function, always=id(function) in factories)
                        stack.enter_context(mock.patch.object(scope, name, recorder))
            yield

    def _recorder(self, function: Callable[..., Any], always: bool) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            if self._running or not (always or _has_proxy((args, kwargs))):
                return function(*args, **kwargs)
            return self.create_proxy("call_function", function, args, kwargs)

        return record

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return ConcreteProxy(node, self)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        self._names = {id(t): n for n, t in [*root.named_buffers(), *root.named_parameters()]}
        return super().trace(root, concrete_args)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if not self._running and isinstance(attr_val, Tensor) and (name := self._names.get(id(attr_val))):
            return self.create_proxy("get_attr", name, (), {})
        return attr_val

    def path_of_module(self, mod: nn.Module) -> str:
        try:
            return super().path_of_module(mod)
        except NameError:
            raise TraceError(f"it calls a {type(mod).__name__} that is no submodule of it") from None

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._running:
            return forward(*args, **kwargs)
        name = self.path_of_module(m)
        if name == _ROOT:
            with _without_new_buffers(m):
                return forward(*args, **kwargs)
        block = name.removeprefix(_ROOT + ".")
        is_opened = block in self._opened
        if self._block is None and (is_opened or holds_blocks(m, self._containers)):
            if is_notrace_module(type(m)):
                self.whole[block] = why_not_opened(m)
            else:
                nodes, whole = len(self.graph.nodes), dict(self.whole)
                self._block = block if is_opened else None
                try:
                    with _stateless(m) if is_opened else _without_new_buffers(m):
                        return forward(*args, **kwargs)
                except Exception as error:  # a model's own code may raise anything
                    for node in list(self.graph.nodes)[: nodes - 1 : -1]:
                        self.graph.erase_node(node)
                    self.whole = whole | {block: why_whole(error)}
                finally:
                    self._block = None
        return self.create_proxy("call_module", name, args, kwargs)

    def create_node(self, kind: str, *rest: Any, **named: Any) -> fx.Node:
        node = super().create_node(kind, *rest, **named)
        node.meta["block"] = self._block
        if kind != "output":
            self._evaluate(node)
        return node

    def create_proxy(self, kind: str, *rest: Any, **named: Any) -> Any:
        proxy = super().create_proxy(kind, *rest, **named)
        return proxy if kind == "output" else self._wrap(proxy)

    def _evaluate(self, node: fx.Node) -> None:
        if _context() != self._context:
            raise TraceError("it switches no_grad or autocast around blocks, or calls an autograd function of its own")
        versions = {n: _version(n) for n in node.all_input_nodes}
        self._running = True
        try:
            for key in BATCHES:
                node.meta[key] = self._run(node, key)
        finally:
            self._running = False
        node.meta["mutated"] = [n for n, version in versions.items() if _version(n) != version]

    def _wrap(self, proxy: Any) -> Any:
        """What the model's code gets to see of a new node."""
        value, twin = (proxy.node.meta[key] for key in BATCHES)
        if type(value) is not type(twin):
            raise TraceError("its control flow depends on the size of the batch")
        if value is None or isinstance(value, (bool, str)):
            return proxy._fixed(lambda concrete: concrete)
        if isinstance(value, (int, float)):
            return value if value == twin else proxy
        if type(value) in (tuple, list, torch.Size):
            return (list if isinstance(value, list) else tuple)(proxy)
        if type(value) is dict:
            return {key: proxy[key] for key in value}
        if isinstance(value, (Tensor, tuple, list, dict, torch.device, torch.dtype)):
            return proxy
        raise TraceError(f"it passes a {type(value).__name__} between blocks")

    def _run(self, node: fx.Node, key: str) -> Any:
        if node.op == "placeholder":
            return self._images[key]
        if node.op == "get_attr":
            if str(node.target).startswith("_"):  # not in the model: torch.fx has put it beside
                raise TraceError("it makes a tensor in a way that does not show in a graph")
            owner, _, name = str(node.target).rpartition(".")
            return getattr(self.root.get_submodule(owner), name)
        args, kwargs = _concrete(node.args, key), _concrete(node.kwargs, key)
        if node.op == "call_module":
            with KeepConstants():
                return self.root.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]


@contextmanager
def _stateless(module: nn.Module) -> Iterator[None]:
    """Refuses a forward that sets attributes or buffers of its module: a graph does not. They are put back."""
    before = {k: copy.copy(v) if isinstance(v, (dict, list)) else v for k, v in vars(module).items()}
    try:
        yield
        if _identities(vars(module)) != _identities(before):
            raise TraceError("it sets attributes of its own")
    finally:
        vars(module).clear()
        vars(module).update(before)


@contextmanager
def _without_new_buffers(module: nn.Module) -> Iterator[None]:
    """Refuses a forward that sets a buffer of its module to another tensor: a graph does not. It is put back."""
    before = dict(module._buffers)
    try:
        yield
        if new := [name for name, buffer in module._buffers.items() if isinstance(buffer, fx.Proxy)]:
            raise TraceError(f"it sets its buffer {new[0]} to another tensor")
    finally:
        module._buffers.clear()
        module._buffers.update(before)


def _identities(value: Any) -> Any:
    """What differs as soon as anything in a value is another object; dicts (of buffers, say) and lists are opened."""
    if isinstance(value, dict):
        return {key: _identities(item) for key, item in value.items()}
    return [_identities(item) for item in value] if isinstance(value, list) else id(value)


def _concrete(argument: Any, key: str) -> Any:
    """A node's argument with values for nodes, and plain lists and dicts, which a leaf may change."""
    if isinstance(argument, fx.Node):
        return argument.meta[key]
    if isinstance(argument, dict):
        return {name: _concrete(item, key) for name, item in argument.items()}
    if isinstance(argument, (tuple, list)):
        items = [_concrete(item, key) for item in argument]
        return items if isinstance(argument, list) else tuple(items)
    return fx.node.map_arg(argument, lambda node: node.meta[key])


def _has_proxy(value: Any) -> bool:
    if isinstance(value, (tuple, list, dict)):
        return any(map(_has_proxy, value.values() if isinstance(value, dict) else value))
    return isinstance(value, fx.Proxy)


def _version(node: fx.Node) -> int | None:
    value = node.meta["value"]
    return value._version if isinstance(value, Tensor) else None


def _context() -> tuple[bool, ...]:
    return (torch.is_grad_enabled(), *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")))
