"""Traces the top level of a model's forward into a torch.fx graph, down to its blocks and no further.

Plain symbolic tracing fails on many real models: they branch on shapes, unpack tuples, build tensors from sizes.
The tracer here computes, beside every node it records, the node's value on fake tensors (shapes without data).
Control flow on shapes then follows the values, tuples unpack, and each node's shape is known when tracing ends.
Sizes stay nodes, so that the recorded graph works for any batch size.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.models import get_notrace_functions, is_notrace_module
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode


class _Root(nn.Module):
    """Calls the model with one image: whatever else its forward takes keeps its default."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone = model

    def forward(self, image: Tensor) -> Any:
        return self.backbone(image)


ROOT = "backbone"


def fake_copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of `model` with fake parameters and buffers on the CPU: no memory, and the original stays untouched.

    Activation checkpointing is switched off in the copy, because a checkpointed run of blocks hides them; units
    checkpoint themselves (see `localprop.chain`).
    """
    memo: dict[int, Any] = {}
    with mode:
        for tensor in [*model.parameters(), *model.buffers()]:
            fake: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = fake
    duplicate = copy.deepcopy(model, memo)
    for module in duplicate.modules():
        if hasattr(module, "grad_checkpointing"):
            module.grad_checkpointing = False
    return duplicate


def has_matrix(module: nn.Module) -> bool:
    """Whether a module holds a weight of two or more axes. Norms and layer scales hold vectors only."""
    return any(p.ndim >= 2 for p in module.parameters())


def trace(model: nn.Module, image: Tensor, mode: FakeTensorMode) -> fx.Graph:
    """Traces `model(image)`.

    Args:
        model: the fake copy of a backbone, in train or eval mode.
        image: a fake batch (batch, channels, height, width).
        mode: the mode that both belong to.

    Returns:
        A graph of calls to blocks and of the operations between them. `node.meta["value"]` is each node's fake
        value, `node.meta["mutated"]` the nodes whose tensors it writes in place. Module names carry no prefix.
    """
    with mode, torch.enable_grad():
        graph = _ConcreteTracer(image).trace(_Root(model))
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = node.target.removeprefix(ROOT + ".")
    kept = {"placeholder", "output", "call_module"}
    graph.eliminate_dead_code(lambda node: node.op in kept or bool(node.meta.get("mutated")))
    return graph


class _ConcreteProxy(fx.Proxy):
    """A traced value that also has a concrete one."""

    @property
    def value(self) -> Any:
        return self.node.meta["value"]

    def __getattr__(self, name: str) -> Any:
        if not callable(getattr(self.value, name)):
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return super().__getattr__(name)

    def __iter__(self) -> Iterator[Any]:
        return iter([self[i] for i in range(len(self.value))])

    def __len__(self) -> int:
        return len(self.value)

    # A size used where Python wants a number (range, math.sqrt, torch.arange) is fixed at its traced value.
    def __index__(self) -> int:
        return self.value.__index__()

    __int__ = __index__

    def __float__(self) -> float:
        return float(self.value)


class _ConcreteTracer(fx.Tracer):
    def __init__(self, image: Tensor) -> None:
        super().__init__(autowrap_functions=tuple(f for f in get_notrace_functions() if callable(f)))
        self.image = image
        self._running = False  # inside a leaf, modules and attributes behave as outside a trace

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _ConcreteProxy(node, self)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        self._names = {id(t): n for n, t in [*root.named_buffers(), *root.named_parameters()]}
        return super().trace(root, concrete_args)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if not self._running and isinstance(attr_val, Tensor) and (name := self._names.get(id(attr_val))):
            return self.create_proxy("get_attr", name, (), {})
        return attr_val

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._running:
            return forward(*args, **kwargs)
        name = self.path_of_module(m)
        if not _holds_blocks(m) and name != ROOT:
            return self.create_proxy("call_module", name, args, kwargs)
        if name == ROOT:
            return forward(*args, **kwargs)
        before = len(self.graph.nodes)
        try:
            return forward(*args, **kwargs)
        except Exception:  # whatever a model's own code does that tracing cannot follow: keep this part whole
            for node in list(self.graph.nodes)[:before-1:-1]:
                self.graph.erase_node(node)
            return self.create_proxy("call_module", name, args, kwargs)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **named)
        if kind == "output":
            return proxy
        node = proxy.node
        versions = {n: _version(n) for n in node.all_input_nodes}
        with self._leaf():
            node.meta["value"] = self._run(node)
        node.meta["mutated"] = [n for n, version in versions.items() if _version(n) != version]
        return self._wrap(proxy, node.meta["value"])

    def _wrap(self, proxy: Any, value: Any) -> Any:
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, (tuple, list)):
            items = [proxy[i] for i in range(len(value))]
            return items if isinstance(value, list) else tuple(items)
        return proxy

    def _run(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self.image
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["value"])
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            return getattr(self.root.get_submodule(owner), name)
        if node.op == "call_module":
            return self.root.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    @contextmanager
    def _leaf(self) -> Iterator[None]:
        running, self._running = self._running, True
        try:
            yield
        finally:
            self._running = running


def _version(node: fx.Node) -> int | None:
    value = node.meta["value"]
    return value._version if isinstance(value, Tensor) else None


def _holds_blocks(module: nn.Module) -> bool:
    """Whether tracing goes into a module because a list of blocks lies at or below it."""
    if is_notrace_module(module):
        return False
    if isinstance(module, nn.Sequential):
        return sum(has_matrix(child) for child in module) > 1
    if type(module).__module__.startswith("torch.nn"):
        return False
    return any(_is_block_list(part) for part in module.modules())


def _is_block_list(module: nn.Module) -> bool:
    """Whether all of a module's weights lie in two or more children of one class that is no basic layer."""
    classes = [type(child) for child in module.children() if has_matrix(child)]
    return len(classes) > 1 and len(set(classes)) == 1 and not _is_basic(classes[0])


def _is_basic(cls: type) -> bool:
    return cls.__module__.startswith("torch.nn") and not issubclass(cls, nn.Sequential)
