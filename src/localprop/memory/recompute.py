"""Recomputes in backward what is cheap to compute and large to keep: activation functions and layer norms.

Of `y = gelu(x); z = y @ w` autograd keeps x for gelu and y for the product, though y follows from x at a hundredth of
the product's cost. Inside `recomputing`, y is not kept: backward computes it again from x, which is kept anyway. So
nothing is kept longer for it, and the result is the same bit for bit. In a transformer's block this is the widest
tensor of the MLP and the input of the MLP; activation checkpointing, which computes the matrix products again too,
saves more and costs a third of the time.

No function call is intercepted for this, because that costs more than many of the calls. A tensor that autograd keeps
refers to the node of the graph that made it, and the node has the inputs that it was made from.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_LAYER_NORM = "NativeLayerNormBackward0"
_NOTES = "localprop.notes"


def _layer_norm(node: Any) -> Tensor:
    source, (*kept, eps) = node._saved_input, node.metadata[_NOTES]
    weight, bias = (None if own is None else own.unpack() for own in kept)
    if source.dtype == torch.float32:  # autocast may have widened weights, too
        weight, bias = (None if tensor is None else tensor.to(source.dtype) for tensor in (weight, bias))
    return torch.native_layer_norm(source, node._saved_normalized_shape, weight, bias, eps)[0]


# How the result of a node, by its name, is computed again. Each node keeps its own input for backward, and gives
# the same bits when it is computed again.
_CHEAP: dict[str, Callable[[Any], Tensor]] = {
    "GeluBackward0": lambda node: F.gelu(node._saved_self, approximate=node._saved_approximate),
    "SiluBackward0": lambda node: F.silu(node._saved_self),
    "MishBackward0": lambda node: F.mish(node._saved_self),
    "HardswishBackward0": lambda node: F.hardswish(node._saved_self),
    "EluBackward0": lambda node: torch.ops.aten.elu(
        node._saved_self, node._saved_alpha, node._saved_scale, node._saved_input_scale
    ),
    "SoftplusBackward0": lambda node: F.softplus(node._saved_self, node._saved_beta, node._saved_threshold),
    "LeakyReluBackward0": lambda node: F.leaky_relu(node._saved_self, node._saved_negative_slope),
    _LAYER_NORM: _layer_norm,
}


class _ChangedInPlace(RuntimeError):
    """A tensor that backward needs was changed. Hooks on saved tensors switch autograd's own check off."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} was changed in place before backward; keep recompute off")


class _Kept:
    """A tensor that autograd keeps."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor, tensor._version

    def unpack(self) -> Tensor:
        if self.tensor._version != self.version:
            raise _ChangedInPlace("a tensor")
        return self.tensor


class _Recomputed:
    """A tensor that is computed again: the result of a node, or a view of it."""

    __slots__ = ("node", "view")

    def __init__(self, node: Any, tensor: Tensor) -> None:
        self.node, self.view = node, (tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(self) -> Tensor:
        name = self.node.name()
        if _weight_rests():
            source = self.node._saved_input if name == _LAYER_NORM else self.node._saved_self
            return source.new_empty(1).expand(self.view[0])
        # What the node has is of the type that autocast gave it.
        with torch.no_grad(), torch._C._DisableAutocast():
            try:
                result = _CHEAP[name](self.node)
            except _ChangedInPlace:
                function = name.removesuffix("Backward0").removeprefix("Native").lower()
                raise _ChangedInPlace(f"an input of {function}") from None
            return result.as_strided(*self.view)


@contextmanager
def recomputing(enabled: bool = True) -> Iterator[None]:
    """Inside, autograd keeps no results of activation functions and layer norms, but computes them again in backward.

    For forwards only: backward may run outside.
    """
    if not enabled:
        yield
        return
    own = set[int]()  # numbers of nodes that have been created inside, and keep something

    def pack(tensor: Tensor) -> _Kept | _Recomputed:
        if _is_newest(tensor):
            kept = _keep(tensor)
        else:
            own.add(_newest_node())  # which keeps the tensor
            kept = _Kept(tensor)
        base = tensor if tensor._base is None else tensor._base
        node: Any = base.grad_fn
        if node is None or node.name() not in _CHEAP:
            return kept
        changed = tensor._version > 0
        elsewhere = node._sequence_nr() not in own  # what activation checkpointing keeps can be unpacked only once
        unknown = node.name() == _LAYER_NORM and _NOTES not in node.metadata
        return kept if changed or elsewhere or unknown else _Recomputed(node, tensor)

    with _norms_noted(), torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        yield


@contextmanager
def keeping() -> Iterator[None]:
    """Inside `recomputing`, autograd keeps everything again, as it does outside."""
    with torch.autograd.graph.saved_tensors_hooks(_keep, _unpack):
        yield


@contextmanager
def keeping_nothing() -> Iterator[None]:
    """Inside, forwards compute what they do with gradients, and autograd keeps nothing: there is no backward."""
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, _no_backward):
        yield


def _no_backward(packed: object) -> Tensor:
    raise RuntimeError("nothing was kept for a backward")


def _weight_rests() -> bool:
    """Whether a product of an input with a weight is at work, in a backward that computes no gradient of the weight.

    Then it looks at nothing of its input but the shape. A head that reads ahead has such a backward.
    """
    node: Any = torch._C._current_autograd_node()
    if node is None or node.name() != "AddmmBackward0":
        return False
    weight = node.next_functions[2][0]
    if weight is None or torch._C._will_engine_execute_node(weight):
        return False
    while weight.name() in ("TBackward0", "ToCopyBackward0"):
        weight = weight.next_functions[0][0]
    return weight.name() == "torch::autograd::AccumulateGrad"


def _newest_node() -> int:
    """The number of the node of the graph that was made last."""
    return torch._C._autograd._get_sequence_nr() - 1


def _is_newest(tensor: Tensor) -> bool:
    """Whether the newest node made the tensor that is to be kept.

    Then the node keeps its own result; or no node keeps it, but activation checkpointing, as what it begins with.
    """
    return tensor.grad_fn is not None and tensor.grad_fn._sequence_nr() == _newest_node()


def _keep(tensor: Tensor) -> _Kept:
    # A node that kept its result with a reference to itself would never be freed, unless backward passes it.
    return _Kept(tensor.detach() if _is_newest(tensor) else tensor)


def _unpack(packed: _Kept | _Recomputed) -> Tensor:
    return packed.unpack()


_lock = threading.Lock()
_inside = 0  # how many forwards, of all threads, are inside `_norms_noted`
_original: Any = None


@contextmanager
def _norms_noted() -> Iterator[None]:
    """Inside, layer norms note in the graph their eps, which torch leaves out, and their weights.

    The graph has the weights, too. But up to torch 2.8, reading a parameter from it removes that parameter's hooks.

    `torch.layer_norm` is what `torch.nn.functional.layer_norm` calls, under whatever name that is imported.
    """
    global _inside, _original
    with _lock:
        if not _inside:
            _original = torch.layer_norm
            torch.layer_norm = _noting_layer_norm
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                torch.layer_norm = _original


def _noting_layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    result = _original(input, normalized_shape, weight, bias, eps, cudnn_enable)
    if result.grad_fn is not None:
        kept = (None if tensor is None else _Kept(tensor.detach()) for tensor in (weight, bias))
        result.grad_fn.metadata[_NOTES] = (*kept, eps)
    return result
