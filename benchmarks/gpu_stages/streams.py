"""Two local modules on two streams: whether a GPU computes them at once faster than one after another."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor

import localprop
from gpu_stages.cases import CLASSES, SWIN
from gpu_stages.large_images import EAGER_NOTE
from gpu_stages.running import Run
from gpu_stages.small_images import FULL, TINY
from gpu_stages.steps import adamw, autocast
from localprop.network.carry import Carry


class ModuleStep:
    """Module k's step on fixed buffers: on CUDA a graph with a stream and a memory pool of its own.

    Attributes:
        inputs, targets: the buffers.
        output: the module's output.
        stream: where it runs; None on a CPU.
    """

    def __init__(self, run: Run, net: localprop.LocalNetwork, k: int, inputs: Tensor, targets: Tensor) -> None:
        self.run, self.net, self.k = run, net, k
        self.inputs, self.targets = inputs, targets
        self.optimizer = adamw(run, net.local_modules[k].parameters(), graphs=run.cuda)
        self.output = self._step()
        self.stream: torch.cuda.Stream | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        if run.cuda:
            self.stream, self._graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(self._graph, stream=self.stream):  # without `pool`: one of its own
                self.output = self._step()

    def __call__(self) -> None:
        """Trains on what the buffers hold."""
        if self._graph is None:
            self.output = self._step()
        else:
            self._graph.replay()

    def _step(self) -> Tensor:
        carry = Carry(self.inputs, self.targets, self.inputs if self.k == 0 else None)
        with autocast(self.run, True, graphs=self.run.cuda):
            self.net.train_module(self.k, carry)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return carry.features


def race(run: Run) -> None:
    """Trains K=2 for some batches: both modules one after another, and both at once on successive batches."""
    size = TINY if run.dry else FULL
    torch.manual_seed(0)
    model = timm.create_model(SWIN, img_size=32, num_classes=CLASSES, **size.kwargs)
    net = localprop.localize(
        model, 2, partition="stage", input_size=(3, 32, 32), amp_dtype=torch.bfloat16, batch_size=size.batch,
        recompute=False, reach=0,
    ).to(run.device).train()  # fmt: skip
    images = torch.randn(size.batch, 3, 32, 32, device=run.device)
    targets = torch.randint(0, CLASSES, (size.batch,), device=run.device)
    first = ModuleStep(run, net, 0, images, targets)
    first()
    second = ModuleStep(run, net, 1, first.output.clone(), targets)
    known = {"units": [module.units[-1] for module in net.local_modules]} | ({} if run.cuda else {"note": EAGER_NOTE})
    count = 2 if run.dry else 60
    for name, batches in {"one after another": _in_turn, "at once, on two streams": _at_once}.items():
        run.attempt(name, lambda batches=batches: _timed(run, size.batch, count, batches, first, second), **known)


def _timed(
    run: Run, batch: int, count: int, batches: Callable[..., None], first: ModuleStep, second: ModuleStep
) -> dict[str, Any]:
    rates = []
    for _ in range(1 if run.dry else 5):
        if run.cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        batches(first, second, count)
        if run.cuda:
            torch.cuda.synchronize()
        rates.append(count * batch / (time.perf_counter() - started))
    return {"images_per_second": round(statistics.median(rates), 1), "each": [round(rate, 1) for rate in rates]}


def _in_turn(first: ModuleStep, second: ModuleStep, count: int) -> None:
    for _ in range(count):
        first()
        second.inputs.copy_(first.output)
        second()


def _at_once(first: ModuleStep, second: ModuleStep, count: int) -> None:
    """The second module trains on a batch while the first trains on the next."""
    if first.stream is None or second.stream is None:
        _in_turn(first, second, count)
        return
    idle, there = torch.cuda.Event(), torch.cuda.Event()
    idle.record(second.stream)
    for _ in range(count):
        with torch.cuda.stream(first.stream):
            first()
            first.stream.wait_event(idle)  # the second module has read its input
            second.inputs.copy_(first.output)
            there.record(first.stream)
        with torch.cuda.stream(second.stream):
            second.stream.wait_event(there)
            second()
            idle.record(second.stream)
    torch.cuda.synchronize()
