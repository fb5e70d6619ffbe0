"""Measures the peak memory of a training step by the allocator's own account, and builds steps to measure."""

import gc
import os
from collections.abc import Callable
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile

import localprop

os.environ.setdefault("KINETO_LOG_LEVEL", "99")
SIZE = (3, 224, 224)
Step = tuple[Callable[[], None], list[torch.Tensor]]
"""A training step, and the tensors that live from step to step."""


def peak_of(step: Callable[[], None], kept: list[torch.Tensor], device: str) -> int:
    """Bytes at the highest moment of `step`: on CUDA the allocator's maximum, on a CPU the sum of its memory events.

    Args:
        step: one training step, which makes its own batch.
        kept: everything that exists before and after: weights, buffers, optimizer state.
        device: cpu or cuda.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in plain(kept)}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return sum(storages.values()) + max(accumulate(changes))


def plain(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """All tensors; a wrapper (a quantized moment) is replaced by the tensors that it consists of."""
    result = []
    for tensor in tensors:
        names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else None
        result += [tensor] if names is None else plain([getattr(tensor, name) for name in names])
    return result


def batch_of(size: int, device: str) -> list[torch.Tensor]:
    """[images, labels]."""
    return [torch.randn(size, *SIZE, device=device), torch.randint(0, 10, (size,), device=device)]


def prime(optimizers: list[torch.optim.Optimizer]) -> list[torch.Tensor]:
    """Gives optimizers the state that they have after a first step, and returns its tensors."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    values = [value for o in optimizers for state in o.state.values() for value in state.values()]
    return [value for value in values if isinstance(value, torch.Tensor)]


def on_device(net: torch.nn.Module, device: str) -> torch.nn.Module:
    """A network, moved where it is elsewhere: one on fake tensors cannot be moved."""
    return net if all(p.device.type == device for p in net.parameters()) else net.to(device)


def local_step(
    net: localprop.LocalNetwork, batch_size: int, device: str, amp: bool = False, parts: int = 1
) -> tuple[Callable[[], None], list[torch.Tensor]]:
    """A training step as a user writes it, and the tensors that live from step to step; optimizers have their state."""
    on_device(net, device).train()
    trained = [[p for p in module.parameters() if p.requires_grad] for module in net.local_modules]
    optimizers = [torch.optim.AdamW([{"params": own}], fused=True) for own in trained]
    state = prime(optimizers)

    def step_module(k: int, loss: torch.Tensor) -> None:
        optimizers[k].step()
        optimizers[k].zero_grad()

    def step() -> None:
        own = batch_of(batch_size, device)
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            for number in range(parts - 1):  # copies, as `localprop train` makes them
                part = [tensor.chunk(parts)[number].clone() for tensor in own]
                net.backward(part.pop(0), part.pop(), parts=parts)
            if parts > 1:
                own = [tensor.chunk(parts)[-1].clone() for tensor in own]
            net.backward(own.pop(0), own.pop(), after_module=step_module, parts=parts)

    return step, [*net.parameters(), *net.buffers(), *state]
