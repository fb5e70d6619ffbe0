"""Measures memory: what PyTorch's allocator gives out in a training step."""

import gc
import json
import os
import re
import resource
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from localprop.errors import first_line
from localprop.tracing.copies import tensors_of


@dataclass
class Measurement:
    """What `measured` found out.

    Attributes:
        peak: largest number of bytes in use at any moment; 0 until the end of the context.
    """

    peak: int = 0


@contextmanager
def measured(existing: Iterable[Tensor], device: torch.device) -> Iterator[Measurement]:
    """Measures the largest number of bytes in use inside, by the allocator's own account.

    On CUDA that is `torch.cuda.max_memory_allocated`. On a CPU it is the sum of `existing` and of the profiler's memory
    events, which PyTorch's CPU allocator reports one by one; the operations inside then are somewhat slower.

    Args:
        existing: the tensors that exist already, such as weights and optimizer state, and live until the end. (Of
            anything older that is freed inside, the CPU's allocator does not know the size.)
        device: where they are.
    """
    result = Measurement()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield result
        result.peak = torch.cuda.max_memory_allocated(device)
        return
    gc.collect()  # else garbage that is freed inside may be taken for something of the step's
    with _profiled() as changes:
        yield result
    result.peak = total_bytes(existing) + max(accumulate(changes), default=0)


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory of tensors; memory that several share counts once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def plain_tensors(value: Any) -> list[Tensor]:
    """The tensors in a value, in lists and dicts too; of wrappers (a quantized moment) those that they are made of."""
    result = []
    for tensor in tensors_of(value):
        inner = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else None
        result += [tensor] if inner is None else plain_tensors([getattr(tensor, name) for name in inner])
    return result


def available(device: torch.device) -> int | None:
    """Bytes that this process can still allocate on a device; None where the system tells none of its limits.

    On a CPU the least of what the control group, the machine and the limit on the address space leave.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = []
    limit, used = (_number(Path("/sys/fs/cgroup", name)) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        found.append(limit - used)
    kibibytes = re.search(r"^MemAvailable:\s*(\d+)", _text(Path("/proc/meminfo")), re.MULTILINE)
    if kibibytes:
        found.append(int(kibibytes[1]) * 1024)
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = _text(Path("/proc/self/statm")).split()
    if address_space != resource.RLIM_INFINITY and pages:
        found.append(address_space - int(pages[0]) * resource.getpagesize())
    return min(found, default=None)


def _text(path: Path) -> str:
    """A file of the system's; empty where the system has none such, or does not let it be read."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    """The number in a file of the system's; None where there is none: a limit that is not set is "max"."""
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def most_taken(device: torch.device) -> int:
    """Most bytes that this process has had at once so far: the allocator's on CUDA, else the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator of PyTorch gave up."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


@contextmanager
def one_memory_error() -> Iterator[None]:
    """Turns whatever an allocator of PyTorch raises into a MemoryError."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise MemoryError(first_line(error)) from error
        raise


def allocated_changes(run: Callable[[], Any]) -> tuple[list[int], Any]:
    """Calls `run`; gives the bytes of each allocation (above 0) and each free (below 0) on the CPU, and its result."""
    with _profiled() as changes:
        result = run()
    return changes, result


@contextmanager
def _profiled() -> Iterator[list[int]]:
    """Gives a list that holds, after the context, the bytes of each allocation and each free on the CPU, in order."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else each profile writes lines of its own to the terminal
    changes: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield changes
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    changes += [event["args"]["Bytes"] for event in sorted(memory, key=lambda event: event["args"]["Ev Idx"])]
