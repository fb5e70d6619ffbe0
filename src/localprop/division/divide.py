"""Divides a backbone into local modules: the one call that puts chain, partition, method and network together."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from localprop.division.division import Division
from localprop.division.resolve import resolved
from localprop.errors import ChainError, ConfigError
from localprop.features import image_layout
from localprop.memory.cost import Costs
from localprop.memory.part import Conditions
from localprop.memory.speed import assumed
from localprop.network.loss import ModuleSpec
from localprop.network.network import LocalNetwork
from localprop.settings.recipe import Recipe
from localprop.tasks.base import Task
from localprop.tasks.classification import Classification, Criterion
from localprop.tracing.chains import chain


def localize(
    model: nn.Module,
    modules: int | None = None,
    method: str = Recipe.method,
    decoder: str = Recipe.decoder,
    head: str | None = Recipe.head,
    *,
    costs: Costs | None = None,
    input_size: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
    batch_size: int = 32,
    micro_batches: int = 1,
    amp_dtype: torch.dtype | None = None,
    device: str | None = None,
    task: Task | None = None,
    criterion: Criterion | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **recipe: Any,
) -> LocalNetwork:
    """Divides `model` into gradient-isolated local modules. The model itself is not changed, but for what is frozen.

    Args:
        model: any image model: timm's, torchvision's, an `nn.Sequential`.
        modules: number of local modules, K; default 4, or 1 for end-to-end.
        method: how modules learn: feature-reconstruction, infopro, greedy, trgl, auglocal, lopt, distance, end-to-end.
        decoder: what rebuilds a target: conv, deconv, pixel-shuffle, transformer, infopro.
        head: what predicts the target in a module: linear, mlp, conv, successor; default: mlp, or what the method says.
        costs: the model's chain and what is known of its costs, from an earlier call; default: found now.
        input_size: (channels, height, width) of the images; default: what the model says of itself.
        num_classes: size of the prediction, checked against the model's; default: that.
        batch_size: batch size for which the partition is made.
        micro_batches: equal parts of a batch, of which only one has activations at a time, for which it is made.
        amp_dtype: type of mixed precision for which the partition is made; default: none.
        device: "cpu" or "cuda", for which the partition is made, and recomputation is chosen where it is left open;
            default: where the model is.
        task: what the network is trained for; default: `Classification`.
        criterion: of a classification: its loss, from (logits, labels); default: cross-entropy.
        mean: per channel, with which images are normalised, for methods that rebuild the image in [0, 1]; default:
            the model's own, else ImageNet's.
        std: likewise.
        recipe: further settings of a `localprop.Recipe`: head_kwargs, kinetic, partition, cuts, min_depth,
            split_blocks, recompute, grad_checkpointing, recompute_units, method_kwargs, freeze, freeze_modules. What is
            frozen is frozen in the model.

    Raises:
        ChainError: the model cannot be cut, or not there or not so often.
        ConfigError: an unknown method, decoder, head or option; units that cannot run in slices of the batch.
    """
    return divide(
        model,
        Recipe.of(modules=modules, method=method, decoder=decoder, head=head, **recipe),
        costs,
        input_size=input_size,
        num_classes=num_classes,
        batch_size=batch_size,
        micro_batches=micro_batches,
        amp_dtype=amp_dtype,
        device=device,
        task=task,
        criterion=criterion,
        mean=mean,
        std=std,
    )


def divide(model: nn.Module, recipe: Recipe, costs: Costs | None = None, **settings: Any) -> LocalNetwork:
    """`localize`, for a recipe."""
    division = division_of(model, recipe, costs, **settings)
    return division.build(division.ends())


def division_of(
    model: nn.Module,
    recipe: Recipe,
    costs: Costs | None = None,
    *,
    input_size: tuple[int, int, int] | None = None,
    num_classes: int | None = None,
    batch_size: int = 32,
    micro_batches: int = 1,
    amp_dtype: torch.dtype | None = None,
    device: str | None = None,
    task: Task | None = None,
    criterion: Criterion | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Division:
    """All that `divide` settles before it is known where to cut; arguments and errors as of `localize`."""
    where = assumed(device or next((p.device.type for p in model.parameters()), "cpu"))
    recipe = resolved(recipe, where)
    if task is not None and criterion is not None:
        raise ConfigError("a task has a loss of its own; leave out either task or criterion")
    task = task or Classification(criterion)
    if num_classes == 0 or getattr(model, "num_classes", None) == 0:
        raise ChainError("the model has no classifier (num_classes=0); build it with the number of labels")
    costs = costs or Costs(model, chain(model, input_size, recipe.split_blocks))
    units = costs.chain
    prediction = units[-1].shape
    task.check_prediction(prediction, task.outputs if num_classes is None else num_classes)
    settings = getattr(model, "pretrained_cfg", None) or {}
    source = image_layout(units.input_size)
    assert recipe.modules is not None  # it is resolved, and so is the head
    assert recipe.head is not None
    spec = ModuleSpec(
        index=0,
        count=recipe.modules,
        input=source,
        output=source,
        source=source,
        task=task,
        prediction=prediction,
        head=recipe.head,
        head_options=dict(recipe.head_kwargs or {}),
        decoder=recipe.decoder,
        mean=tuple(mean or settings.get("mean") or IMAGENET_DEFAULT_MEAN),
        std=tuple(std or settings.get("std") or IMAGENET_DEFAULT_STD),
    )
    step = Conditions(-(-batch_size // micro_batches), amp_dtype, device=where, gradients_wait=micro_batches > 1)
    return Division(costs, recipe, spec, step)
