"""How long operations take: their kernels on a device, and the host that calls one after the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten
_HALF = (torch.bfloat16, torch.float16)
# Products of many small matrices, and convolutions; any other operation with FLOPs is a product of large matrices, or
# attention as one kernel.
_BATCHED = {_aten.bmm, _aten.baddbmm}
_CONVOLUTIONS = {_aten.convolution, _aten.convolution_backward}
# Which compute nothing.
_EMPTY = {_aten.empty, _aten.empty_like, _aten.new_empty, _aten.empty_strided, _aten.new_empty_strided}


@dataclass(frozen=True)
class Products:
    """Floating point operations per second in matrix products of one precision.

    Attributes:
        large: products of two large matrices.
        batched: products of many small ones, as in the attention of small windows.
        convolution: convolutions.
        attention: attention as one kernel.
    """

    large: float
    batched: float
    convolution: float
    attention: float


@dataclass(frozen=True)
class Host:
    """Seconds that Python, autograd and a launch need, whatever is computed.

    Attributes:
        forward: for an operation that Python code calls.
        backward: for an operation that autograd calls.
        hooked: more for an operation whose saved tensors go through hooks in Python, as with recomputation.
        again: for each time that Python code runs again in backward, as with activation checkpointing.
        given: for each tensor that an operation is given: an optimizer's step is one operation on hundreds.
    """

    forward: float
    backward: float
    hooked: float
    again: float
    given: float


@dataclass(frozen=True)
class Machine:
    """How fast a device and its host are.

    Attributes:
        single: products in float32.
        half: products in bfloat16 and float16.
        bandwidth: bytes per second that a kernel reads and writes.
        kernel: seconds that the shortest kernel takes.
        host: what the host needs.
        cuda: whether it is a CUDA GPU, which computes while the host calls what comes next.
        link: bytes per second to another process.
        host_link: bytes per second between the device and pinned memory of the host.
    """

    single: Products
    half: Products
    bandwidth: float
    kernel: float
    host: Host
    cuda: bool
    link: float
    host_link: float

    def rate(self, precision: str, kind: str) -> float:
        """Floating point operations per second, of what `product` says of an operation."""
        rate: float = getattr(getattr(self, precision), kind)
        return rate


def product(func: Any, inputs: Sequence[Tensor]) -> tuple[str, str]:
    """The precision ("single", "half") and the kind of an operation with floating point operations; see `Products`."""
    half = next((t.dtype in _HALF for t in inputs if t.is_floating_point()), False)
    packet, kind = func.overloadpacket, "large"
    if packet in _BATCHED:
        kind = "batched"
    elif packet in _CONVOLUTIONS:
        kind = "convolution"
    elif "attention" in packet.__name__:
        kind = "attention"
    return "half" if half else "single", kind


class Clock:
    """The time of a machine while operations come one after the other.

    A CPU does everything in turn. A CUDA GPU begins a kernel when the kernel before is done and the host has launched
    it: while the GPU is behind, launches cost nothing; while it waits, they are what a step takes.

    Args:
        machine: the machine.

    Attributes:
        busy: seconds of kernels so far: the time of the same operations in a CUDA graph, which is one launch.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.busy = 0.0
        self._host = 0.0  # when the host is done
        self._device = 0.0  # when the device is done with what the host has launched
        self._again = False

    @property
    def seconds(self) -> float:
        """Seconds until everything so far is done."""
        return max(self._host, self._device)

    def wait(self, until: float) -> None:
        """Lets what is launched from now on begin at this second at the earliest."""
        self._device = max(self._device, until)
        if not self.machine.cuda:
            self._host = max(self._host, until)

    def count(self, func: Any, inputs: Sequence[Tensor], flops: int, moved: int) -> None:
        """Adds an operation.

        Args:
            func: the operation.
            inputs: tensors that it reads.
            flops: its floating point operations.
            moved: bytes that it reads and writes.
        """
        if func.overloadpacket in _EMPTY:
            return
        self._host += self._called(func, inputs)
        took = self._kernel(func, inputs, flops, moved)
        self.busy += took
        if self.machine.cuda:
            self._device = max(self._device, self._host) + took
        else:
            self._host += took

    def _kernel(self, func: Any, inputs: Sequence[Tensor], flops: int, moved: int) -> float:
        machine = self.machine
        shortest = 0.0 if self._in_a_list(func) else machine.kernel
        computed = flops / machine.rate(*product(func, inputs)) if flops else 0.0
        return shortest + max(computed, moved / machine.bandwidth)

    def _called(self, func: Any, inputs: Sequence[Tensor]) -> float:
        """Seconds until the host has called an operation."""
        host, python = self.machine.host, torch.is_grad_enabled()
        backward = torch._C._current_graph_task_id() != -1
        again, self._again = backward and python and not self._again, backward and python
        seconds = host.backward if backward and not python else host.forward
        if python and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            seconds += host.hooked
        if self._in_a_list(func):
            seconds = 0.0
        return seconds + host.given * len(inputs) + (host.again if again else 0.0)

    def _in_a_list(self, func: Any) -> bool:
        """Whether it is one of many that are a single launch on a GPU: norms of gradients."""
        return self.machine.cuda and func.overloadpacket is _aten.linalg_vector_norm


# "cpu" is one thread of a server (Intel Xeon with AMX), beside other work. Its rates are those of
# benchmarks/results/rates_cpu.json: each operation of end-to-end training of Swin-Tiny and ViT-S at batch 8. So
# benchmarks/results/clock_cpu.json, which compares settings, checks them.
# "cuda" is an NVIDIA H200 with its host, in eager steps. Its numbers are fitted to the times of Swin-Tiny at 224 px in
# benchmarks/results/gpu_ba3b577, in which float32 is without TF32, as PyTorch has it for all but convolutions.
# On paper an H200 does 67 TFLOP/s in float32, 990 in bfloat16, and moves 4.8 TB/s; PyTorch's eager kernels come to
# less. Other GPUs and hosts differ: one that is measured is one more entry.
MACHINES = {
    "cpu": Machine(
        single=Products(large=1.0e11, batched=1.1e10, convolution=6.7e10, attention=5.6e10),
        half=Products(large=3.6e11, batched=5.3e10, convolution=5.1e10, attention=3.8e10),
        bandwidth=6.8e9,
        kernel=2e-6,
        host=Host(forward=20e-6, backward=20e-6, hooked=10e-6, again=700e-6, given=1e-6),
        cuda=False,
        link=1e9,  # an order of magnitude: its loopback
        host_link=6.8e9,  # the same memory
    ),
    "cuda": Machine(
        single=Products(large=4.87e13, batched=1.36e13, convolution=1.24e14, attention=4.87e13),
        half=Products(large=6e14, batched=1.5e14, convolution=1.5e14, attention=3e14),
        bandwidth=1.84e12,
        kernel=5.5e-6,
        host=Host(forward=16.5e-6, backward=25e-6, hooked=20e-6, again=780e-6, given=3.2e-6),
        cuda=True,
        link=5e10,  # an order of magnitude: NVLink or PCIe
        host_link=2.5e10,  # an order of magnitude: PCIe 4 with 16 lanes
    ),
}


def assumed(device: str) -> str:
    """Whose kernels and speed to assume for a type of device, "cpu" or "cuda": those of a CPU for any other ("mps")."""
    return device if device in MACHINES else "cpu"
