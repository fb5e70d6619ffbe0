"""Memory: what fits a budget, what a step is predicted to need, and what to say when memory has run out."""

import re
from dataclasses import replace

from localprop.errors import OutOfMemory, PlanError
from localprop.memory.measure import available, most_taken, total_bytes
from localprop.memory.speed import assumed
from localprop.network.network import LocalNetwork
from localprop.planning.settings import chosen, plan_for, train_command
from localprop.planning.simulation import simulate_step
from localprop.report.formats import format_bytes
from localprop.runs.experiment import Experiment
from localprop.settings.values import parse_bytes


def choose_for_budget(experiment: Experiment) -> tuple[Experiment, str]:
    """Chooses the number of modules for the budget; gives the experiment with it, and a line that tells of it.

    Raises:
        PlanError: nothing fits, or with more micro-batches only, which is the user's choice to make.
    """
    config, budget = experiment.config, parse_bytes(experiment.config.local.budget or "")
    device = assumed(experiment.device.type)
    result = plan_for(experiment.backbone, config.local, config.optim, experiment.input_size, budget, device=device)
    row = result.choice
    assert row is not None
    limit, peak = format_bytes(budget), format_bytes(row.step.peak)
    new = chosen(config, row)
    if row.micro_batches > config.optim.micro_batches:
        raise PlanError(
            f"nothing fits {limit} with {row.batch_size // config.optim.micro_batches} images at a time; "
            f"{row.setting.name} in {row.micro_batches} micro-batches takes {peak}: {train_command(new)}"
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
            backbone, device = experiment.backbone.cpu(), assumed(experiment.device.type)
            size = experiment.input_size
            row = plan_for(backbone, config.local, config.optim, size, limit, device=device).choice
        except PlanError as nothing:
            return OutOfMemory(f"{text}; {nothing}")
        assert row is not None
        peak = format_bytes(row.step.peak)
        return OutOfMemory(
            f"{text}; {format_bytes(limit)} can be had, this takes {peak}: {train_command(chosen(config, row))}"
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
