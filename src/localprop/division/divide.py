"""Divides a backbone into local modules: the one call that puts chain, partition, method and network together."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torch.nn import functional as F

from localprop.division.partition import balanced, module_ends, most_modules, stage_ends
from localprop.errors import ChainError, ConfigError, listing, suggestion
from localprop.features import image_layout, infer_layout
from localprop.memory.cost import Costs, module_peak
from localprop.memory.part import Conditions, Cost
from localprop.memory.tracker import MACHINES
from localprop.methods import build_loss, check_method
from localprop.network.network import Criterion, LocalLoss, LocalModule, LocalNetwork, ModuleSpec
from localprop.registry import DECODERS, HEADS
from localprop.tracing.chains import chain

PARTITIONS = ("balanced", "compute", "stage")


def localize(
    model: nn.Module,
    modules: int | None = None,
    method: str = "feature-reconstruction",
    decoder: str = "conv",
    head: str = "mlp",
    *,
    partition: Literal["balanced", "compute", "stage"] = "balanced",
    cuts: Sequence[str] | None = None,
    min_depth: int = 1,
    split_blocks: bool = False,
    recompute: bool | None = None,
    grad_checkpointing: bool = False,
    costs: Costs | None = None,
    input_size: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
    batch_size: int = 32,
    micro_batches: int = 1,
    amp_dtype: torch.dtype | None = None,
    device: str | None = None,
    criterion: Criterion = F.cross_entropy,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    method_kwargs: dict[str, Any] | None = None,
) -> LocalNetwork:
    """Divides `model` into gradient-isolated local modules. The model itself is not changed.

    Args:
        model: any image model: timm's, torchvision's, an `nn.Sequential`.
        modules: number of local modules, K; default 4, or 1 for end-to-end.
        method: how modules learn: feature-reconstruction, infopro, greedy, end-to-end.
        decoder: what rebuilds a target: conv, deconv, pixel-shuffle, transformer, infopro.
        head: what predicts the label inside the network: linear, mlp, conv.
        partition: "balanced", the module that takes most memory takes as little as can be; "compute", the slowest
            module takes as little time as can be; or "stage", at changes of resolution.
        cuts: names of units, or of blocks of units ("layers.0"), to cut after, instead of modules and partition.
        min_depth: least number of blocks, or parts of split ones, in a module: very shallow modules learn worse. A
            module also ends with a block then: a downsampling, or a stem, goes with what follows it. With 0 a module
            may begin and end anywhere. (Explicit cuts are as they are.)
        split_blocks: let units be parts of blocks, such as a transformer block's attention and its MLP.
        recompute: compute activation functions and layer norms again in backward instead of keeping their results:
            less memory, the same numbers. Default: in local modules, but not end-to-end.
        grad_checkpointing: keep of each unit its input only, and run it again in backward.
        costs: the model's chain and what is known of its costs, from an earlier call; default: found now.
        input_size: (channels, height, width) of the images; default: what the model says of itself.
        num_classes: number of labels, checked against the model's logits; default: their number.
        batch_size: batch size for which the partition is made.
        micro_batches: equal parts of a batch, of which only one has activations at a time, for which it is made.
        amp_dtype: type of mixed precision for which the partition is made; default: none.
        device: "cpu" or "cuda", for which the partition is made; default: where the model is.
        criterion: loss of predicted labels, from (logits, labels).
        mean: per channel, with which images are normalised, for methods that rebuild the image in [0, 1]; default:
            the model's own, else ImageNet's.
        std: likewise.
        method_kwargs: options of the method, such as {"weight": 0.5}.

    Raises:
        ChainError: the model cannot be cut, or not there or not so often.
        ConfigError: an unknown method, decoder, head or option.
    """
    options = dict(method_kwargs or {})
    if cuts is not None and modules not in (None, len(cuts) + 1):
        raise ConfigError(f"{len(cuts)} cuts make {len(cuts) + 1} modules, not {modules}; leave out one of the two")
    count = check_method(method, len(cuts) + 1 if cuts is not None else modules, options)
    HEADS.lookup(head)  # also where the method has no use for it
    DECODERS.lookup(decoder)
    if min_depth < 0:
        raise ConfigError(f"min_depth is {min_depth}; it must be at least 0")
    if num_classes == 0 or getattr(model, "num_classes", None) == 0:
        raise ChainError("the model has no classifier (num_classes=0); build it with the number of labels")
    costs = costs or Costs(model, chain(model, input_size, split_blocks))
    units = costs.chain
    classes = units[-1].shape[-1]
    if len(units[-1].shape) != 1 or num_classes not in (None, classes):
        raise ChainError(
            f"the model gives an output of shape {units[-1].shape} per image, expected ({num_classes or 'classes'},); "
            "build it with the right num_classes"
        )
    settings = getattr(model, "pretrained_cfg", None) or {}
    image = image_layout(units.input_size)
    spec = ModuleSpec(
        index=0,
        count=count,
        input=image,
        output=image,
        image=image,
        num_classes=classes,
        criterion=criterion,
        head=head,
        decoder=decoder,
        mean=tuple(mean or settings.get("mean") or IMAGENET_DEFAULT_MEAN),
        std=tuple(std or settings.get("std") or IMAGENET_DEFAULT_STD),
    )
    recompute = count > 1 if recompute is None else recompute
    where = device or next((p.device.type for p in model.parameters()), "cpu")
    where = where if where in MACHINES else "cpu"
    conditions = Conditions(
        -(-batch_size // micro_batches),
        amp_dtype,
        "cheap" if recompute else "none",
        where,
        gradients_wait=micro_batches > 1,
    )
    division = _Division(costs, method, options, spec, conditions, grad_checkpointing)
    if cuts is not None:
        ends = [*(units.position(name) for name in cuts), len(units)]
        if ends != sorted(set(ends)):
            names = listing(unit.name for unit in units)
            raise ChainError(f"cuts {listing(cuts)} are not in order and before the last unit of: {names}")
    elif partition == "stage":
        ends = division.balance(stage_ends(units), min_depth, "memory", "stages, where the resolution changes")
    elif partition in ("balanced", "compute"):
        ends = division.balance(
            list(range(1, len(units) + 1)), min_depth, "memory" if partition == "balanced" else "time", "units"
        )
    else:
        raise ConfigError(f"no partition is called {partition!r}; {suggestion(partition, PARTITIONS)}")
    return division.build(ends)


class _Division:
    """A backbone with everything settled but where to cut."""

    def __init__(
        self,
        costs: Costs,
        method: str,
        options: dict[str, Any],
        spec: ModuleSpec,
        conditions: Conditions,
        grad_checkpointing: bool,
    ) -> None:
        self.costs, self.method, self.options, self.spec = costs, method, options, spec
        self.model, self.units = costs.model, costs.chain
        self.conditions = conditions  # of a module's last unit, and of its local loss, which run once
        self.grad_checkpointing = grad_checkpointing
        units = self.units
        self.layouts = [
            spec.image,
            *(
                infer_layout((1, *unit.shape), units.input_size, units.prefix_tokens, units.output_format)
                for unit in units
            ),
        ]

    def loss(self, index: int, start: int, stop: int, **changes: Any) -> LocalLoss:
        """The local loss of the module of units [start, stop)."""
        spec = replace(self.spec, index=index, input=self.layouts[start], output=self.layouts[stop], **changes)
        return build_loss(self.method, spec, self.options)

    def balance(self, ends: list[int], min_depth: int, aim: Literal["memory", "time"], what: str) -> list[int]:
        """The `count` of the possible `ends` with which the largest module is smallest, auxiliary nets included."""
        if self.spec.count == 1:
            return ends[-1:]
        possible = module_ends(self.units, ends, min_depth)
        count, most = self.spec.count, most_modules(self.units, possible, min_depth)
        if count > most:
            blocks = sum(unit.depth for unit in self.units)
            depth = f", and a module takes at least {min_depth} of its {blocks} blocks" if most < len(ends) else ""
            raise ChainError(
                f"{count} modules asked for, but the backbone has {len(ends)} {what}{depth}: "
                f"at most {max(most, 1)}: {listing(self.units[end - 1].name for end in possible)}"
            )
        ends = possible
        starts = [0, *ends]
        cost = self._costs(aim)
        depths = [0, *accumulate(unit.depth for unit in self.units)]

        def allowed(i: int, j: int) -> float:
            start, stop = starts[i], starts[j]
            return cost(start, stop) if depths[stop] - depths[start] >= min_depth else float("inf")

        return [starts[j] for j in balanced(len(ends), count, allowed)]

    def _costs(self, aim: Literal["memory", "time"]) -> Callable[[int, int], float]:
        """The cost of a module of units [start, stop): bytes at its peak, or expected time."""
        others = replace(self.conditions, recomputation="whole") if self.grad_checkpointing else self.conditions
        # What a unit costs as the first of its module, which needs no gradient of its input, and as the last, which is
        # never checkpointed.
        costs = {
            (first, last): self.costs.units(replace(self.conditions if last else others, input_gradient=not first))
            for first in (False, True)
            for last in (False, True)
        }

        @cache
        def auxiliary(index: int, start: int, stop: int) -> Cost:
            with torch.random.fork_rng(devices=[]):
                # The user's criterion may not take such labels as the cost is found with, and keeps next to nothing.
                loss = self.loss(index, start, stop, criterion=F.cross_entropy)
            return self.costs.auxiliary(loss, self._shape(stop), self._shape(start), self.conditions)

        def cost(start: int, stop: int) -> float:
            own = [costs[i == start, i == stop - 1][i] for i in range(start, stop)]
            # Which module it will be is not known yet, only whether the first, the last or between.
            index = 0 if start == 0 else self.spec.count - 1 if stop == len(self.units) else 1
            # Of units with equal outputs any stands for all: their auxiliary nets cost the same.
            loss = auxiliary(index, self._representative(start), self._representative(stop))
            return module_peak(own, loss) if aim == "memory" else sum(unit.seconds for unit in [*own, loss])

        return cost

    def build(self, ends: list[int]) -> LocalNetwork:
        """The network with modules that end after these numbers of units."""
        first = next(self.model.parameters(), torch.empty(0))
        local_modules = []
        for index, (start, stop) in enumerate(pairwise([0, *ends])):
            loss = self.loss(index, start, stop).to(first.device, first.dtype)
            local_modules.append(
                LocalModule(
                    self.model,
                    self.units[start:stop],
                    loss,
                    self.layouts[stop],
                    self.conditions.recomputation == "cheap",
                    self.grad_checkpointing,
                )
            )
        return LocalNetwork(self.model, local_modules, self.units.input_size)

    def _shape(self, position: int) -> tuple[int, ...]:
        return self.units[position - 1].shape if position else self.units.input_size

    def _representative(self, position: int) -> int:
        if position in (0, len(self.units)):
            return position
        return next(p for p in range(1, position + 1) if self._shape(p) == self._shape(position))
