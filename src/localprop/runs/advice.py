"""What fits: settings chosen for a budget, and the way out when memory has run out."""

import re
import shlex
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from torch import nn

from localprop.errors import OutOfMemory, PlanError
from localprop.memory.measure import available, most_taken, total_bytes
from localprop.memory.tracker import assumed
from localprop.models.backbone import create_backbone
from localprop.network.network import LocalNetwork
from localprop.planning.plans import MODULES, Plan, PlanRow, Setting, plan
from localprop.planning.processes import Processes
from localprop.planning.simulation import simulate_step
from localprop.report.formats import format_bytes
from localprop.runs.experiment import Experiment
from localprop.settings.config import LocalConfig, OptimConfig, PlanConfig, TrainConfig
from localprop.settings.flat import to_flags, to_flat
from localprop.settings.recipe import Recipe
from localprop.settings.values import parse_bytes
from localprop.tracing.chains import chain


def plan_for(
    model: nn.Module,
    local: LocalConfig,
    optim: OptimConfig,
    input_size: tuple[int, int, int] | None,
    budget: int | None = None,
    **options: Any,
) -> Plan:
    """The plan of a run's own settings; `options` are further arguments of `localprop.plan.plan`."""
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
        **recipe,
        **options,
    )


def chosen(config: TrainConfig, row: PlanRow) -> TrainConfig:
    """The settings of a run, with a plan's choice in them."""
    choice = row.setting.recipe
    if row.setting.modules == 1:  # the rest of the recipe is as the user had it
        choice = replace(config.local.recipe, method=choice.method, modules=None, cuts=None, split_blocks=False)
        choice = replace(choice, grad_checkpointing=row.setting.grad_checkpointing)
    local = replace(config.local, **{f.name: getattr(choice, f.name) for f in fields(Recipe)})
    optim = replace(config.optim, batch_size=row.batch_size, micro_batches=row.micro_batches)
    return replace(config, local=local, optim=optim)


def command(config: TrainConfig) -> str:
    """The command that trains with these settings."""
    return shlex.join(["localprop", "train", *to_flags(config)])


def fit(experiment: Experiment) -> tuple[Experiment, str]:
    """Chooses the number of modules for the budget; gives the experiment with it, and a line that tells of it.

    Raises:
        PlanError: nothing fits, or with more micro-batches only, which is the user's choice to make.
    """
    config, budget = experiment.config, parse_bytes(experiment.config.local.budget or "")
    result = plan_for(experiment.backbone, config.local, config.optim, experiment.input_size, budget)
    row = result.choice
    assert row is not None
    limit, peak = format_bytes(budget), format_bytes(row.step.peak)
    new = chosen(config, row)
    if row.micro_batches > config.optim.micro_batches:
        raise PlanError(
            f"nothing fits {limit} with {row.batch_size // config.optim.micro_batches} images at a time; "
            f"{row.setting.name} in {row.micro_batches} micro-batches takes {peak}: {command(new)}"
        )
    return replace(experiment, config=new), f"budget {limit}: {row.setting.name}, predicted to take {peak}"


class Headroom:
    """How much memory there was for training, found before it began.

    Args:
        experiment: the experiment, its backbone on its device already.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        free = available(experiment.device)
        # What the weights take has been taken already.
        weights = total_bytes(experiment.backbone.parameters())
        self.limit = None if free is None else free + weights
        # On a CPU the process has libraries and data in memory too, which are not training's.
        self._others = 0 if experiment.device.type == "cuda" else most_taken(experiment.device) - weights

    def explain(self, error: MemoryError, predicted: int | None) -> OutOfMemory:
        """The error to show when memory has run out: what was predicted, what was taken, and what would fit."""
        experiment, config = self.experiment, self.experiment.config
        expected = "not predicted" if predicted is None else f"{format_bytes(predicted)} predicted"
        taken = format_bytes(max(most_taken(experiment.device) - self._others, 0))
        asked = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        text = (
            f"out of memory on {experiment.device}: {expected}, {taken} taken when "
            f"{asked[1] if asked else 'something'} more could not be had"
        )
        if self.limit is None:
            return OutOfMemory(f"{text}; see what fits: localprop plan --model {config.backbone.model} --budget ...")
        # Room for what an allocator cannot use.
        limit = int(0.95 * self.limit)
        try:
            config = replace(
                config,
                local=replace(config.local, modules=None, cuts=None, budget=None),
                run=replace(config.run, experiment=None, resume=None),  # the folder of this run is taken
            )
            row = plan_for(experiment.backbone.cpu(), config.local, config.optim, experiment.input_size, limit).choice
        except PlanError as nothing:
            return OutOfMemory(f"{text}; {nothing}")
        assert row is not None
        peak = format_bytes(row.step.peak)
        return OutOfMemory(
            f"{text}; {format_bytes(limit)} can be had, this takes {peak}: {command(chosen(config, row))}"
        )


def predict(experiment: Experiment, net: LocalNetwork, headroom: Headroom) -> tuple[int | None, list[str]]:
    """The predicted peak of a training step in bytes, and lines for the user.

    None if the network's code cannot run on fake tensors.
    """
    optim = experiment.config.optim
    try:
        peak = simulate_step(net, optim, optim.batch_size, experiment.input_size, experiment.device.type).peak
    except PlanError as error:
        return None, [str(error)]
    kind = experiment.device.type
    how = (
        "predicted"
        if assumed(kind) == kind
        else f"predicted with the kernels of a CPU, since those of {kind} are unknown"
    )
    lines = [f"peak memory of a step: {format_bytes(peak)} ({how})"]
    if headroom.limit is not None and peak > headroom.limit:
        room = format_bytes(headroom.limit)
        lines.append(
            f"but only {room} can be had on {experiment.device}: --budget {room.replace(' ', '')} finds what fits"
        )
    return peak, lines


def plan_model(config: PlanConfig, on_setting: Callable[[Setting], None]) -> tuple[Plan, str]:
    """The plan of a timm model, and a title for it."""
    size, backbone = config.backbone.img_size, config.backbone
    if backbone.model_kwargs is None:
        backbone = replace(backbone, model_kwargs={})
    model, _ = create_backbone(replace(backbone, pretrained=False), config.num_classes)
    units = chain(model, (3, size, size) if size else None)
    optim = OptimConfig(
        opt=config.opt,
        batch_size=config.batch_size,
        micro_batches=config.micro_batches,
        model_ema=config.model_ema,
        offload_optimizer=config.offload_optimizer,
        amp=config.precision != "fp32",
        amp_dtype="float16" if config.precision == "fp16" else "bfloat16",
    )
    budget = parse_bytes(config.local.budget) if config.local.budget else None
    result = plan_for(
        model,
        config.local,
        optim,
        units.input_size,
        budget,
        device=config.device,
        nproc=config.nproc,
        bandwidth=parse_bytes(config.bandwidth) if config.bandwidth else None,
        explain=config.explain,
        on_setting=on_setting,
    )
    height, width = units.input_size[1:]
    parts = f" in {config.micro_batches} parts" if config.micro_batches > 1 else ""
    batch = f"batch {config.batch_size}{parts}"
    title = f"{backbone.model} at {height}x{width}, {batch}, {config.precision}, {config.opt}"
    return result, title


def plan_train_config(config: PlanConfig, row: PlanRow) -> TrainConfig:
    """The settings with which `localprop train` does what a row of a plan says."""
    optim = OptimConfig(
        opt=config.opt,
        model_ema=config.model_ema,
        offload_optimizer=config.offload_optimizer,
        amp=config.precision != "fp32",
        amp_dtype="float16" if config.precision == "fp16" else "bfloat16",
    )
    local = replace(config.local, budget=None)
    return chosen(TrainConfig(backbone=config.backbone, local=local, optim=optim), row)


def plan_lines(config: PlanConfig, result: Plan) -> list[str]:
    """What a plan comes to, in words."""
    lines = [f"picture: {config.picture}"] + ([f"everything: {config.json}"] if config.json else [])
    if result.choice is None or result.budget is None:
        return lines
    row, limit = result.choice, format_bytes(result.budget)
    peak = format_bytes(row.step.peak)
    what = f"{row.setting.name} takes {peak}"
    if row.micro_batches > config.micro_batches:
        at_once = row.batch_size // config.micro_batches
        what = f"with {at_once} images at a time nothing; {row.setting.name} in {row.micro_batches} parts takes {peak}"
    return [*lines, "", f"within {limit}: {what}", command(plan_train_config(config, row)) + " --data folder:PATH"]


def plan_report(config: PlanConfig, result: Plan) -> dict[str, Any]:
    """Everything that a plan says, for a JSON file; memory in bytes."""

    def describe(row: PlanRow) -> dict[str, Any]:
        return {
            **row.setting.described(),
            "batch_size": row.batch_size,
            "micro_batches": row.micro_batches,
            "peak": row.step.peak,
            **row.step.parts,
            "peak_module": row.step.module + 1,
            "memory_ratio": result.memory_ratio(row),
            "flops": row.step.flops,
            "flops_ratio": result.flops_ratio(row),
            "time_ratio": result.time_ratio(row),
            "module_units": row.module_units,
        }

    report: dict[str, Any] = {"config": to_flat(config), "rows": [describe(row) for row in result.rows]}
    if config.parallel:
        for row, described in zip(result.rows, report["rows"], strict=True):
            described["parallel"] = _describe_processes(row.parallel, result.speedup(row))
            if row.not_parallel:
                described["not_parallel"] = row.not_parallel
        report["pipeline"] = _describe_processes(result.pipeline, result.pipeline_speedup)
    if result.left_out:
        report["left_out"] = result.left_out
    if result.explained:
        report["explained"] = {**asdict(result.explained), "module": result.explained.module + 1}
    if result.choice is not None:
        report |= {"budget": result.budget, "choice": describe(result.choice)}
        report["command"] = command(plan_train_config(config, result.choice))
    return report


def _describe_processes(processes: Processes | None, speedup: float | None) -> dict[str, Any] | None:
    if processes is None:
        return None
    timing = processes.timing
    return {
        "ranks": [
            {"modules": [k + 1 for k in modules], "units": units, "peak": peak, "waiting": waiting}
            for modules, units, peak, waiting in zip(
                processes.ranks, processes.units, processes.peaks, timing.waiting, strict=True
            )
        ],
        "micro_batches": processes.micro_batches,
        "replicas": processes.replicas,
        "bottleneck": timing.bottleneck,
        "expected_seconds": timing.seconds,
        "speedup": speedup,
    }
