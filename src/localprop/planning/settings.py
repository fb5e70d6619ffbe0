"""Settings and plans: the plan of a run's settings, and the settings of a plan's choice."""

import shlex
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from localprop.division.resolve import with_methods_defaults
from localprop.models.backbone import create_backbone
from localprop.models.sources import with_source
from localprop.planning.planner import optim_of
from localprop.planning.plans import MODULES, Plan, plan
from localprop.planning.rows import PlanRow, Setting
from localprop.settings.config import LocalConfig, OptimConfig, TrainConfig
from localprop.settings.flat import to_flags
from localprop.settings.plan import PlanConfig
from localprop.settings.rates import fine_tunes, with_usual_rates
from localprop.settings.recipe import Recipe
from localprop.settings.trust import without_starting_weights
from localprop.settings.values import parse_bytes
from localprop.tracing.sizes import own_input_size

# What makes a setting of a plan: the rest of its recipe is the user's.
_FOUND = (
    "method",
    "freeze",
    "freeze_modules",
    "modules",
    "cuts",
    "split_blocks",
    "reach",
    "recompute",
    "grad_checkpointing",
    "recompute_units",
)


def plan_for(
    model: nn.Module,
    local: LocalConfig,
    optim: OptimConfig,
    input_size: tuple[int, int, int] | None,
    budget: int | None = None,
    **options: Any,
) -> Plan:
    """The plan of a run's own settings; `options` are further arguments of `localprop.plan`."""
    recipe = {f.name: getattr(local, f.name) for f in fields(Recipe)}
    del recipe["modules"]
    return plan(
        model,
        optim.batch_size,
        modules=MODULES if local.count is None else (local.count,),
        input_size=input_size,
        opt=optim,
        amp_dtype=getattr(torch, optim.amp_dtype) if optim.amp else None,
        budget=budget,
        finish=local.finish,
        **recipe,
        **options,
    )


def plan_model(config: PlanConfig, on_setting: Callable[[Setting], None]) -> tuple[Plan, str]:
    """The plan of a timm model, and a title for it."""
    size, (backbone, _) = config.backbone.img_size, with_source(config.backbone)
    kwargs = without_starting_weights(backbone.model_kwargs or {})
    model = create_backbone(replace(backbone, pretrained=False, model_kwargs=kwargs), config.num_classes).model
    input_size = (3, size, size) if size else own_input_size(model)
    optim = OptimConfig(
        opt=config.opt,
        batch_size=config.batch_size,
        micro_batches=config.micro_batches,
        model_ema=config.model_ema,
        offload_optimizer=config.offload_optimizer,
        offload_boundaries=config.offload_boundaries,
        amp=config.precision != "fp32",
        amp_dtype="float16" if config.precision == "fp16" else "bfloat16",
    )
    budget = parse_bytes(config.local.budget) if config.local.budget else None
    result = plan_for(
        model,
        config.local,
        optim,
        input_size,
        budget,
        device=config.device,
        nproc=config.nproc,
        bandwidth=parse_bytes(config.bandwidth) if config.bandwidth else None,
        explain=config.explain,
        show="fronts",
        trained=fine_tunes(config.backbone),
        on_setting=on_setting,
    )
    _, height, width = input_size
    parts = f" in {config.micro_batches} parts" if config.micro_batches > 1 else ""
    batch = f"batch {config.batch_size}{parts}"
    title = f"{backbone.model} at {height}x{width}, {batch}, {config.precision}, {config.opt}"
    reach = with_methods_defaults(config.local).reach
    title += f", LoRA of rank {backbone.lora}" if backbone.lora else ""
    title += f", reach {reach}" if reach else ""
    title += f", finish {config.local.finish:g}" if config.local.finish else ""
    return result, title


def chosen(config: TrainConfig, row: PlanRow) -> TrainConfig:
    """The settings of a run, with a setting of a plan in them."""
    recipe = row.setting.recipe
    own = {name: getattr(recipe, name) for name in _FOUND}
    optim = replace(config.optim, batch_size=row.batch_size, micro_batches=row.micro_batches)
    if recipe.end_to_end:  # which has no options or finish, and one module usually; the rest is as the user had it
        own |= {"method_kwargs": None, "modules": None if row.setting.modules == 1 else own["modules"], "finish": 0.0}
        optim = replace(optim, finish_lr=None)
    local = replace(config.local, **own)
    return replace(config, local=local, optim=optim_of(row.setting, optim))


def chosen_for_plan(config: PlanConfig, row: PlanRow) -> TrainConfig:
    """The settings with which `localprop train` does what a row of a plan says."""
    optim = OptimConfig(
        opt=config.opt,
        model_ema=config.model_ema,
        offload_optimizer=config.offload_optimizer,
        offload_boundaries=config.offload_boundaries,
        amp=config.precision != "fp32",
        amp_dtype="float16" if config.precision == "fp16" else "bfloat16",
    )
    local = replace(config.local, budget=None)
    return chosen(with_usual_rates(TrainConfig(backbone=config.backbone, local=local, optim=optim), ()), row)


def train_command(config: TrainConfig) -> str:
    """The command that trains with these settings; nothing is left for a budget to choose."""
    settled = replace(config, local=replace(config.local, budget=None))
    return shlex.join(["localprop", "train", *to_flags(settled)])
