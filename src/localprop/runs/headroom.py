"""Memory: what fits a budget, what a step is predicted to need, and what to say when memory has run out."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from localprop.errors import OutOfMemory, PlanError
from localprop.memory.measure import available, most_taken, total_bytes
from localprop.memory.speed import assumed
from localprop.network.network import LocalNetwork
from localprop.planning.plans import Plan
from localprop.planning.reporting import faster_divided, reason
from localprop.planning.rows import PlanRow
from localprop.planning.search.proposals import Proposed
from localprop.planning.settings import chosen, plan_for, train_command
from localprop.planning.simulation import simulate_step
from localprop.report.formats import format_bytes
from localprop.runs.experiment import Experiment
from localprop.settings.config import LocalConfig, OptimConfig, TrainConfig
from localprop.settings.flat import to_flags
from localprop.settings.rates import fine_tunes
from localprop.settings.recipe import END_TO_END, Recipe
from localprop.settings.values import parse_bytes


def choose_for_budget(experiment: Experiment, open_: bool = False) -> tuple[Experiment, list[str]]:
    """Chooses the fastest setting for the budget: of exact training if that is the method, else of local modules.

    Args:
        experiment: the experiment.
        open_: whether nothing asks for a way to train. From trained weights the first of all that is proposed is taken
            then, if it fits; from scratch exact training alone.

    Returns:
        The experiment with it, and lines that tell of it and of what else is proposed.

    Raises:
        PlanError: nothing fits, or only what changes numbers, which is the user's choice to make: more micro-batches,
            another optimizer.
    """
    config, budget = experiment.config, parse_bytes(experiment.config.local.budget or "")
    device, trained = assumed(experiment.device.type), fine_tunes(config.backbone)
    backbone, size = experiment.backbone, experiment.input_size
    options: dict[str, Any] = {"offload": config.run.cuda_graphs != "on"}  # which need all that lives in one place
    result = plan_for(
        backbone, config.local, config.optim, size, budget, device=device, show="fits", trained=trained, **options
    )
    asked: Proposed = "exact" if config.local.end_to_end else "local"
    names = [*result.proposed] if open_ and trained else [asked]
    taken = next((name for name in names if (own := result.fits[name]) and own.setting.same_numbers), None)
    if taken is None:
        raise _nothing_fits(config, names, result, budget)
    row = result.fits[taken]
    assert row is not None
    line = f"budget {format_bytes(budget)}: {row.setting.name}, predicted to take {format_bytes(row.peak)}"
    if trained:
        line += f" and {result.time_ratio(row):.2f} of the time of end-to-end training; "
        line += reason(row, device, config.local.finish, trained)
    if taken == "exact" and (divided := result.divided_fit):
        line += f"; {faster_divided(divided, row)}: --micro-batches {divided.micro_batches}"
    others = {name: own for name, own in result.fits.items() if name != taken and own and own.setting.same_numbers}
    more = [_told_beside(config, name, other, row, device) for name, other in others.items()]
    return replace(experiment, config=chosen(config, row)), [line, *more]


def _nothing_fits(config: TrainConfig, names: Sequence[Proposed], result: Plan, budget: int) -> PlanError:
    """What is said where nothing fits of what may be taken: what else does."""
    rows = [row for row in result.fits.values() if row]
    found = next((row for row in rows if row.setting.same_numbers), None)
    row = found or next((own for name in names if (own := result.fits[name])), None) or rows[0]
    images = config.optim.batch_size // config.optim.micro_batches
    kind = f"{names[0]} " if len(names) == 1 else ""
    return PlanError(
        f"nothing {kind}fits {format_bytes(budget)} with {images} images at a time; {row.setting.name} "
        f"takes {format_bytes(row.peak)}: {train_command(chosen(config, row))}"
    )


def _told_beside(config: TrainConfig, name: Proposed, other: PlanRow, row: PlanRow, device: str) -> str:
    """What another way to train would bring, and how to ask for it, as a sentence."""
    ratio, trained = other.seconds / row.seconds, fine_tunes(config.backbone)
    told = reason(other, device, config.local.finish, trained)
    if not trained:
        asks = f"--method {END_TO_END if name == 'exact' else Recipe.method}"
        return f"{asks} would take {ratio:.2f} of its time ({other.setting.name}); {told}"
    found = chosen(config, other)
    rests = {name: getattr(found.optim, name) for name in ("offload_optimizer", "offload_boundaries")}
    flags = to_flags(TrainConfig(local=replace(found.local, budget=None), optim=OptimConfig(**rests)))
    took = f"{other.setting.name} would take {format_bytes(other.peak)} and {ratio:.2f} of its time"
    return f"{took}: {told}; in place of --budget: {shlex.join(flags)}"


def _open(local: LocalConfig) -> LocalConfig:
    """Without all that a budget chooses."""
    local = replace(local, modules=None, cuts=None, split_blocks=False, budget=None)
    return replace(local, grad_checkpointing=False, recompute_units=None)


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
                local=_open(config.local),
                run=replace(config.run, experiment=None, resume=None),  # the folder of this run is taken
            )
            backbone, device = experiment.backbone.cpu(), assumed(experiment.device.type)
            size = experiment.input_size
            plan = plan_for(backbone, config.local, config.optim, size, limit, device=device, show="fits")
        except PlanError as nothing:
            return OutOfMemory(f"{text}; {nothing}")
        row = (plan.exact_fit if config.local.end_to_end else plan.local_fit) or plan.choice
        assert row is not None
        peak = format_bytes(row.peak)
        return OutOfMemory(
            f"{text}; {format_bytes(limit)} can be had, this takes {peak}: {train_command(chosen(config, row))}"
        )


def predict(experiment: Experiment, nets: Sequence[LocalNetwork], headroom: Headroom) -> tuple[int | None, list[str]]:
    """The predicted peak of a training step in bytes, and lines for the user.

    None if a network's code cannot run on fake tensors.

    Args:
        experiment: what is trained.
        nets: the network, and with a finish that of it.
        headroom: of the device.
    """
    optim, kind = experiment.config.optim, experiment.device.type
    try:
        steps = [simulate_step(net, optim, optim.batch_size, experiment.input_size, kind) for net in nets]
    except PlanError as error:
        return None, [str(error)]
    peak, texts = max(step.peak for step in steps), [format_bytes(step.peak) for step in steps]
    how = (
        "predicted"
        if assumed(kind) == kind
        else f"predicted with the kernels of a CPU, since those of {kind} are unknown"
    )
    lines = [f"peak memory of a step: {', in the finish '.join(texts)} ({how})"]
    if headroom.limit is not None and peak > headroom.limit:
        room = format_bytes(headroom.limit)
        lines.append(
            f"but only {room} can be had on {experiment.device}: --budget {room.replace(' ', '')} finds what fits"
        )
    return peak, lines
