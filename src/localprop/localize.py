"""Divides a backbone into local modules: the one call that puts chain, partition, method and network together."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torch.nn import functional as F

from localprop.chain import Chain, chain
from localprop.cost import Cost, auxiliary_cost, unit_costs
from localprop.decoders import DECODERS
from localprop.errors import ChainError, ConfigError, suggestion
from localprop.features import image_layout, infer_layout
from localprop.heads import HEADS
from localprop.methods import build_loss, check_method
from localprop.network import Criterion, LocalLoss, LocalModule, LocalNetwork, ModuleSpec
from localprop.partition import balanced, stage_ends

_NOMINAL_BATCH = 32
"""Batch size for which a balanced partition weighs activations against gradients, where none is given."""


def localize(
    model: nn.Module,
    modules: int | None = None,
    method: str = "feature-reconstruction",
    decoder: str = "conv",
    head: str = "mlp",
    *,
    partition: Literal["balanced", "stage"] = "balanced",
    cuts: Sequence[str] | None = None,
    input_size: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
    batch_size: int = _NOMINAL_BATCH,
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
        partition: "balanced", the largest module as small as can be; or "stage", at changes of resolution.
        cuts: names of units, or of blocks of units ("layers.0"), to cut after, instead of modules and partition.
        input_size: (channels, height, width) of the images; default: what the model says of itself.
        num_classes: number of labels, checked against the model's logits; default: their number.
        batch_size: batch size for which a balanced partition is made.
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
    for kind, name, known in (("head", head, HEADS), ("decoder", decoder, DECODERS)):
        if name not in known:  # also where the method has no use for it
            raise ConfigError(f"unknown {kind} {name!r}; {suggestion(name, known)}")
    units = chain(model, input_size)
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
    plan = _Plan(model, units, method, options, spec)
    if cuts is not None:
        ends = [*(units.position(name) for name in cuts), len(units)]
        if ends != sorted(set(ends)):
            raise ChainError(f"cuts {', '.join(cuts)} are not in order and before the last unit of: {units.names()}")
    elif partition == "stage":
        ends = plan.balance(stage_ends(units), batch_size, "stages, where the resolution changes")
    elif partition == "balanced":
        ends = plan.balance(list(range(1, len(units) + 1)), batch_size, "units")
    else:
        raise ConfigError(f"no partition is called {partition!r}; {suggestion(partition, ['balanced', 'stage'])}")
    return plan.build(ends)


class _Plan:
    """A backbone with everything settled but where to cut."""

    def __init__(self, model: nn.Module, units: Chain, method: str, options: dict[str, Any], spec: ModuleSpec) -> None:
        self.model, self.units, self.method, self.options, self.spec = model, units, method, options, spec
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

    def balance(self, ends: list[int], batch_size: int, what: str) -> list[int]:
        """The `count` of the possible `ends` that make the largest module smallest, auxiliary nets included."""
        if self.spec.count > len(ends):
            raise ChainError(
                f"{self.spec.count} modules asked for, but the backbone has {len(ends)} {what}, so at most "
                f"{len(ends)}: {', '.join(self.units[end - 1].name for end in ends)}"
            )
        if self.spec.count == len(ends):
            return ends
        if self.spec.count == 1:
            return ends[-1:]
        costs = unit_costs(self.model, self.units)
        starts = [0, *ends]

        @cache
        def auxiliary(index: int, start: int, stop: int) -> Cost:
            with torch.random.fork_rng(devices=[]):
                # The user's criterion may not take such labels as the cost is found with, and keeps next to nothing.
                loss = self.loss(index, start, stop, criterion=F.cross_entropy)
            shapes = [self._shape(stop), self._shape(start), self._shape(0)]
            return auxiliary_cost(loss, *shapes)

        def cost(i: int, j: int) -> float:
            start, stop = starts[i], starts[j]
            own = sum(costs[start:stop], Cost(0, 0))
            # Which module it will be is not known yet, only whether the first, the last or between.
            index = 0 if start == 0 else self.spec.count - 1 if stop == len(self.units) else 1
            # Of units with equal outputs any stands for all: their auxiliary nets cost the same.
            same = self._representative
            return (own + auxiliary(index, same(start), same(stop))).bytes(batch_size)

        return [starts[j] for j in balanced(len(ends), self.spec.count, cost)]

    def build(self, ends: list[int]) -> LocalNetwork:
        """The network with modules that end after these numbers of units."""
        first = next(self.model.parameters(), torch.empty(0))
        local_modules = []
        for index, (start, stop) in enumerate(pairwise([0, *ends])):
            loss = self.loss(index, start, stop).to(first.device, first.dtype)
            local_modules.append(LocalModule(self.model, self.units[start:stop], loss, self.layouts[stop]))
        return LocalNetwork(self.model, local_modules)

    def _shape(self, position: int) -> tuple[int, ...]:
        return self.units[position - 1].shape if position else self.units.input_size

    def _representative(self, position: int) -> int:
        if position in (0, len(self.units)):
            return position
        return next(p for p in range(1, position + 1) if self._shape(p) == self._shape(position))
