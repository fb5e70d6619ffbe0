"""Builds the network for the measurements of parallel training, and measures the times of its parts."""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from typing import Any

import timm
import torch
from torch import nn
from torch.nn import functional as F

import localprop
from localprop.network.carry import Carry
from localprop.planning.schedules import StageTime

MODEL, CLASSES, SIDE = "swin_tiny_patch4_window7_224", 10, 32


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for the sizes of network and batch."""
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--embed-dim", type=int, default=48)
    parser.add_argument("--depths", type=int, nargs=4, default=[2, 2, 2, 2])


def model_kwargs(embed_dim: int, depths: Sequence[int]) -> dict[str, Any]:
    """Arguments of timm.create_model, without the size of the images and the number of classes."""
    sizes = {"patch_size": 2, "window_size": 4, "embed_dim": embed_dim}
    return sizes | {"depths": tuple(depths), "num_heads": (3, 6, 12, 24)}


def backbone(embed_dim: int, depths: Sequence[int]) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(MODEL, num_classes=CLASSES, img_size=SIDE, **model_kwargs(embed_dim, depths)).train()


def localized(model: nn.Module, modules: int, batch_size: int, **options: Any) -> localprop.LocalNetwork:
    """The local network that `localprop train --partition compute` builds; `options` are those of `localize`."""
    options |= {"input_size": (3, SIDE, SIDE), "batch_size": batch_size}
    return localprop.localize(model, modules, partition="compute", **options)


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that `localprop train` makes."""
    return timm.optim.create_optimizer_v2(module, opt="adamw", lr=3e-3, weight_decay=0.05, fused=True)


def batch_of(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(images, labels)."""
    return torch.randn(size, 3, SIDE, SIDE), torch.randint(0, CLASSES, (size,))


def arriving(net: localprop.LocalNetwork, k: int, batch_size: int) -> Callable[[], Carry]:
    """A function that makes a batch as module k receives it, in memory of its own."""
    images, labels = batch_of(batch_size)
    features, context = images, {}
    with torch.no_grad():
        for module in net.local_modules[:k]:
            features = module(features, context)
    return lambda: Carry(features.clone(), labels.clone(), None, dict(context))


def local_step(
    net: localprop.LocalNetwork, k: int, optimizer: torch.optim.Optimizer, arrive: Callable[[], Carry], parts: int
) -> int:
    """Trains module k alone on a batch in so many parts; returns the bytes that each part sends on."""
    size = 0
    for _ in range(parts):
        carry = arrive()
        net.train_module(k, carry, parts=parts)
        size = carry.features.nbytes + carry.targets.nbytes
        del carry
    optimizer.step()
    optimizer.zero_grad()
    return size


def time_modules(net: localprop.LocalNetwork, batch_size: int, parts: int, rounds: int) -> list[StageTime]:
    """Time of each module's step, and the bytes that it sends: medians, module by module in one process."""
    optimizers = [optimizer_of(module) for module in net.local_modules]
    arrivals = [arriving(net, k, batch_size // parts) for k in range(len(optimizers))]
    seconds: list[list[float]] = [[] for _ in optimizers]
    sizes = [0] * len(optimizers)
    for _ in range(rounds + 1):
        for k, optimizer in enumerate(optimizers):
            began = time.perf_counter()
            sizes[k] = parts * local_step(net, k, optimizer, arrivals[k], parts)
            seconds[k].append(time.perf_counter() - began)
    return [StageTime(statistics.median(own[1:]), output=size) for own, size in zip(seconds, sizes, strict=True)]


def time_units(model: nn.Module, batch_size: int, rounds: int) -> list[StageTime]:
    """Times of each unit in end-to-end training: forward, the two parts of backward, the optimizer's step.

    The part of backward for weights alone is the additional time of backward with their gradients. The optimizer's step
    is measured as a whole, and divided in proportion to the weights.
    """
    units = localprop.chain(model, (3, SIDE, SIDE))
    images, labels = batch_of(batch_size)
    optimizer = optimizer_of(model)
    times: list[list[tuple[float, float, float]]] = [[] for _ in units]
    updates, sizes = [], [0] * len(units)
    for _ in range(rounds + 1):
        features, context = images, {}
        for i, unit in enumerate(units):
            weights = [model.get_parameter(name) for name in unit.parameters]
            x = features.detach().requires_grad_(i > 0)
            own_labels = labels if i == len(units) - 1 else None
            began = time.perf_counter()
            output = _forward(model, unit, x, context, own_labels)
            middle = time.perf_counter()
            gradients = torch.autograd.grad(output, [*([x] if i else []), *weights], torch.ones_like(output))
            whole = time.perf_counter() - middle
            for weight, gradient in zip(weights, gradients[1 if i else 0 :], strict=True):
                weight.grad = gradient
            features = unit(model, x.detach(), context).detach()
            sizes[i] = features.nbytes
            again = _forward(model, unit, x, context, own_labels)
            inner = _time_inner(again, x) if i else 0.0
            times[i].append((middle - began, inner, max(whole - inner, 0.0)))
        began = time.perf_counter()
        optimizer.step()
        updates.append(time.perf_counter() - began)
        optimizer.zero_grad()
    update = statistics.median(updates[1:])
    total = sum(p.nbytes for p in model.parameters())
    stages = []
    for unit, own, size in zip(units, times, sizes, strict=True):
        forward_, inner, rest = (statistics.median(part) for part in zip(*own[1:], strict=True))
        kept = sum(model.get_parameter(name).nbytes for name in unit.parameters)
        stages.append(StageTime(forward_, inner, rest, update * kept / total, size, kept))
    return stages


def _forward(
    model: nn.Module, unit: localprop.Unit, x: torch.Tensor, context: dict[str, Any], labels: torch.Tensor | None
) -> torch.Tensor:
    output = unit(model, x, context)
    return output if labels is None else F.cross_entropy(output, labels)


def _time_inner(output: torch.Tensor, x: torch.Tensor) -> float:
    began = time.perf_counter()
    torch.autograd.grad(output, x, torch.ones_like(output))
    return time.perf_counter() - began


def joined(units: Sequence[StageTime], batches: int = 1) -> StageTime:
    """Times of consecutive units as one stage, for so many (micro-)batches; the optimizer steps once."""
    sums = [batches * sum(getattr(unit, name) for unit in units) for name in ("forward", "backward", "weights")]
    gradients = sum(unit.gradients for unit in units)
    return StageTime(*sums, sum(unit.update for unit in units), batches * units[-1].output, gradients)


def cut_evenly(units: Sequence[StageTime], stages: int) -> list[int]:
    """The ends of consecutive runs of units, such that the slowest run is as fast as possible."""

    def slowest(ends: Sequence[int]) -> float:
        return max(joined(units[i:j]).seconds for i, j in pairwise([0, *ends]))

    return min(([*cuts, len(units)] for cuts in combinations(range(1, len(units)), stages - 1)), key=slowest)
