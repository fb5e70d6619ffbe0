"""Training steps to measure: eager, as CUDA graphs, or compiled."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import localprop
from gpu_stages.cases import CLASSES, Case, Way
from gpu_stages.running import Run

Mode = Literal["eager", "graphs", "compiled"]
Step = Callable[[], None]
Train = Callable[[list[Tensor]], object]
"""Trains on [inputs, targets], which it takes out of the list, so that the inputs are freed as early as can be."""


def build(run: Run, case: Case, way: Way, mode: Mode) -> Step:
    """A step that makes its own random batch and trains on it. As graphs it needs CUDA; elsewhere it runs eagerly."""
    graphs = mode == "graphs" and run.cuda
    if way.kind in ("local", "exact"):
        train = _in_modules(run, case, way, mode, graphs)
    else:
        train = _ordinary(run, case, way, mode, graphs)
        if graphs:
            train = BareGraph(train)

    def step() -> None:
        train(batch(run, case))

    return step


def batch(run: Run, case: Case) -> list[Tensor]:
    """[images, labels], random."""
    images = torch.randn(case.batch, *case.size, device=run.device)
    return [images, torch.randint(0, CLASSES, (case.batch,), device=run.device)]


def autocast(run: Run, amp: bool, graphs: bool) -> AbstractContextManager[object]:
    """Mixed precision; what a graph is made of keeps no casts of weights from one step to the next."""
    return torch.autocast(run.device.type, torch.bfloat16, enabled=amp, cache_enabled=not graphs)


def adamw(run: Run, parameters: Iterable[nn.Parameter], graphs: bool) -> torch.optim.Optimizer:
    """AdamW, fused; its learning rate is a tensor where a graph is to read it."""
    if not graphs:
        return torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    rate = torch.tensor(1e-4, device=run.device)
    return torch.optim.AdamW(parameters, lr=rate, fused=True, capturable=True)


class BareGraph:
    """A whole step as one CUDA graph: the first call runs it eagerly, the second captures it, later ones replay it.

    Args:
        train: the step.
    """

    def __init__(self, train: Train) -> None:
        self._train, self._stream = train, torch.cuda.Stream()
        self._buffers: list[Tensor] = []
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, own: list[Tensor]) -> None:
        """Trains on a batch; it is copied into the buffers that the graph reads."""
        if not self._buffers:
            self._buffers = [tensor.clone() for tensor in own]
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(2):
                    self._train(list(self._buffers))
            torch.cuda.current_stream().wait_stream(self._stream)
            return
        for buffer, tensor in zip(self._buffers, own, strict=True):
            buffer.copy_(tensor)
        own.clear()
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream):
                self._train(list(self._buffers))
            self._graph = graph
        self._graph.replay()


def _ordinary(run: Run, case: Case, way: Way, mode: Mode, graphs: bool) -> Train:
    """A plain loop over timm's model."""
    model = case.backbone().to(run.device).train()
    if way.kind == "checkpointing":
        model.set_grad_checkpointing()
    optimizer = adamw(run, model.parameters(), graphs)
    if mode == "compiled":
        model.compile(dynamic=False)

    def train(own: list[Tensor]) -> None:
        with autocast(run, case.amp, graphs):
            loss = F.cross_entropy(model(own.pop(0)), own.pop())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return train


def localized(run: Run, case: Case, way: Way) -> localprop.LocalNetwork:
    """The network of a way, with its cuts, in training mode."""
    net = localprop.localize(
        case.backbone(),
        cuts=way.cuts,
        input_size=case.size,
        batch_size=case.batch,
        amp_dtype=case.amp_dtype,
        **way.options,
    )
    return net.to(run.device).train()


def _in_modules(run: Run, case: Case, way: Way, mode: Mode, graphs: bool) -> Train:
    """Local learning or exact training: each module is stepped as soon as its gradients are there."""
    net = localized(run, case, way)
    if mode == "compiled":
        for module in net.local_modules:
            module.compile(dynamic=False)
            module.local_loss.compile(dynamic=False)
    optimizers = [adamw(run, module.parameters(), graphs) for module in net.local_modules]

    def after_module(k: int, loss: Tensor) -> None:
        optimizers[k].step()
        optimizers[k].zero_grad()

    if graphs:
        captured = net.capture(after_module=after_module)

        def replay(own: list[Tensor]) -> None:
            with autocast(run, case.amp, graphs):
                captured(own.pop(0), own.pop())

        return replay

    def train(own: list[Tensor]) -> None:
        with autocast(run, case.amp, graphs):
            net.backward(own.pop(0), own.pop(), after_module=after_module)

    return train
