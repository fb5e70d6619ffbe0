"""What operations allocate and compute, seen from below autograd: on fake tensors, so without memory or a GPU."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from localprop.memory.cuda import cuda_workspace, matrix_product_buffers, rounded
from localprop.memory.layers import Layers
from localprop.memory.remembered import Remembered, call_of, device_of, remember
from localprop.memory.speed import MACHINES, Clock, Machine
from localprop.memory.workspace import workspace

_aten = torch.ops.aten
_DEVICE = torch.ops.prim.device.default
# The CPU's attention has no count of its own; its arguments begin as those of CUDA's.
_LIKE = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _aten._scaled_dot_product_flash_attention_backward,
}

_known: dict[Any, tuple[Remembered, "_Effort"]] = {}  # by the device and all that a result depends on
_MOST = 50_000


@dataclass(eq=False, slots=True)
class Allocation:
    """The memory of one or more tensors that share it.

    Attributes:
        size: bytes.
        start: number of the event with which it began.
        stop: number of the event with which it ended; None while it lives.
        kind: what it is used for, where somebody has said so.
        shape: of the tensor that it was made for; empty for memory that a kernel allocates for itself.
        dtype: of that tensor.
        layer: what made it, if the tracker was given `Layers`.
        forward: whether a layer's forward made it, for the first time or, in backward, again; likewise.
    """

    size: int
    start: int
    stop: int | None = None
    kind: str | None = None
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    layer: str | None = None
    forward: bool = False


@dataclass(frozen=True)
class Event:
    """A change of memory in use.

    Attributes:
        change: bytes; below zero where memory is freed.
        seconds: expected seconds of computing before it.
        backward: whether autograd was computing gradients.
    """

    change: int
    seconds: float
    backward: bool


@dataclass(eq=False)
class Tracker(TorchDispatchMode):
    """Records each allocation, each free and the floating point operations of what runs inside it.

    A number that Python code asks of a fake tensor is 1: finite, and true.

    Attributes:
        machine: whose speed to assume.
        layers: tells which layer makes what is allocated; None where nobody will ask.
        events: changes of memory in use, in order.
        flops: floating point operations so far, a multiply and an add counted as two.
        clock: the time of the operations so far.
    """

    machine: Machine = field(default_factory=lambda: MACHINES["cpu"])
    layers: Layers | None = None
    events: list[Event] = field(default_factory=list)
    allocations: list[Allocation] = field(default_factory=list)
    flops: float = 0.0

    def __post_init__(self) -> None:
        super().__init__()
        self.clock = Clock(self.machine)
        self._used = 0
        self._known: dict[int, Allocation] = {}  # by the storage's address, which is free again after its end

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operation."""
        if func is _DEVICE and (device := device_of(args[0])):  # which autograd asks more often than all else
            return device
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a wrapper (a quantized moment) takes it apart first, and its parts come here
        if func is _aten._local_scalar_dense.default:
            return 1
        if func.namespace == "prim":  # asks a tensor for something
            return func(*args, **(kwargs or {}))
        result, effort = self._run(func, args, kwargs or {})
        if func.is_view:  # gives another view of it
            if self.layers and isinstance(result, Tensor):
                self._reshape(result, self.layers)
            return result
        if effort.work:
            self.flops += effort.work.flops
            self.clock.count(func, *effort.work)
        for tensor in tensors_in(result):
            self.allocation(tensor)
        if effort.scratch:
            allocation = self._begin(effort.scratch)
            allocation.stop = len(self.events)
            self._record(-allocation.size)
        return result

    def _run(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, "_Effort"]:
        """Runs an operation, or gives what is known of its result."""
        call = call_of(func, args, kwargs)
        key = (self.on_cuda, call.key) if call else None
        if call and key in _known:
            remembered, effort = _known[key]
            return remembered.again(call.inputs), effort.on(call.inputs)
        new = remember(func, args, kwargs, call.inputs) if call else None
        result = new.again(call.inputs) if call and new else func(*args, **kwargs)
        scratch, done = 0, None
        if not func.is_view:
            scratch = cuda_workspace(func, args) if self.on_cuda else workspace(func, args)
            done = work(func, args, kwargs, result, tensors_in(result))
        effort = _Effort(done, scratch)
        if new:
            if len(_known) >= _MOST:
                _known.clear()
            _known[key] = new, effort.on([])
        return result, effort

    def allocation(self, tensor: Tensor) -> Allocation:
        """The allocation of a tensor; one that was made outside begins now."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known[key] = allocation = self._begin(storage.nbytes())
            allocation.shape, allocation.dtype = tuple(tensor.shape), tensor.dtype
            weakref.finalize(storage, self._end, key).atexit = False
        return self._known[key]

    def label(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Says what tensors are used for."""
        for tensor in tensors:
            self.allocation(tensor).kind = kind

    @property
    def on_cuda(self) -> bool:
        """Whether kernels and allocator are CUDA's."""
        return self.machine.cuda

    @property
    def seconds(self) -> float:
        """Expected seconds until all operations so far are done."""
        return self.clock.seconds

    def keep_buffers(self) -> None:
        """Adds what libraries of the device allocate in their first call and never free."""
        for size in matrix_product_buffers() if self.on_cuda else []:
            allocation = self._begin(size)
            allocation.kind, allocation.layer = "temporaries", "matrix products"

    @property
    def used(self) -> int:
        """Bytes in use now."""
        return self._used

    def in_use(self) -> list[int]:
        """Bytes in use after each event."""
        return list(accumulate(event.change for event in self.events))

    def _reshape(self, view: Tensor, layers: Layers) -> None:
        """Gives memory the shape that the layer that made it gives it in the end: a linear layer flattens its input."""
        allocation = self._known.get(view.untyped_storage()._cdata)
        whole = allocation and view.is_contiguous() and view.nbytes == allocation.size
        if allocation and whole and allocation.forward and layers.running and allocation.layer == layers.at_work():
            allocation.shape = tuple(view.shape)

    def stop(self) -> None:
        """Records nothing more: what is freed after this counts as alive to the end."""
        self._known.clear()

    def _begin(self, size: int) -> Allocation:
        allocation = Allocation(rounded(size) if self.on_cuda else size, len(self.events))
        if self.layers:
            allocation.layer, allocation.forward = self.layers.at_work(), self.layers.running
        self.allocations.append(allocation)
        self._record(allocation.size)
        return allocation

    def _end(self, key: int) -> None:
        allocation = self._known.pop(key, None)
        if allocation:
            allocation.stop = len(self.events)
            self._record(-allocation.size)

    def _record(self, change: int) -> None:
        self._used += change
        backward = torch._C._current_graph_task_id() != -1
        self.events.append(Event(change, self.seconds, backward))


class _Effort(NamedTuple):
    """What an operation takes: its work, if it does any, and bytes that it needs beside its results."""

    work: "Work | None"
    scratch: int

    def on(self, inputs: list[Tensor]) -> "_Effort":
        """The same for other inputs that look the same."""
        return self._replace(work=self.work._replace(inputs=inputs)) if self.work else self


def tensors_in(result: Any) -> list[Tensor]:
    """The tensors of an operation's result."""
    return [result] if isinstance(result, Tensor) else [t for t in tree_leaves(result) if isinstance(t, Tensor)]


class Work(NamedTuple):
    """What an operation reads, its floating point operations, and the bytes that it reads and writes."""

    inputs: list[Tensor]
    flops: int
    moved: int


def work(func: Any, args: Any, kwargs: Any, result: Any, outputs: list[Tensor]) -> Work | None:
    """The work of an operation whose result has these tensors; None of one that gives another view of an input."""
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    sources = {t.untyped_storage()._cdata for t in inputs}
    if not func._schema.is_mutable and all(t.untyped_storage()._cdata in sources for t in outputs):
        return None
    moved = sum(t.numel() * t.element_size() for t in [*inputs, *outputs])
    count = flop_registry.get(_LIKE.get(func.overloadpacket, func.overloadpacket))
    return Work(inputs, count(*args, **kwargs, out_val=result) if count else 0, moved)
