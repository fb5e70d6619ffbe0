"""What a run does whether it trains alone or as one of several processes: prepare, begin or resume, train, and show."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from localprop.errors import ConfigError, counted, listing, printable
from localprop.network.network import LocalNetwork
from localprop.report.progress import Progress
from localprop.report.summary import final_table, next_steps
from localprop.runs.description import note_resumption, note_tested, tested_before, tested_line, write_description
from localprop.runs.experiment import Experiment, prepare
from localprop.runs.headroom import choose_for_budget
from localprop.runs.recorded_data import data_of_run
from localprop.runs.recorded_recipe import recipe_of_run
from localprop.settings.config import DataConfig, TrainConfig
from localprop.settings.rates import rate_notes
from localprop.settings.recipe import runs_again
from localprop.system.commands import resume_command
from localprop.training.outputs import WEIGHTS
from localprop.training.signals import Interrupted
from localprop.training.stage import Finish
from localprop.training.state import TrainingState
from localprop.training.trainer import Trainer


def prepare_run(
    config: TrainConfig, resumed: Path | None, anew: bool, console: Console, open_: bool
) -> tuple[Experiment, list[str]]:
    """Loads data and model, and chooses what the settings leave to a budget.

    Args:
        config: the settings.
        resumed: the folder of the run that is resumed; None for a new one.
        anew: whether there is no checkpoint to resume from.
        console: where to show that it takes a while.
        open_: whether nothing asks for a way to train, so that a budget chooses it.

    Returns:
        What to train, and lines for the user.
    """
    experiment = prepare(config, weights=anew)
    notes = experiment.data.notes + (rate_notes(experiment.config) if anew else [])
    if resumed and not anew:
        data, more = data_of_run(resumed, experiment.data)
        recipe = recipe_of_run(resumed, config.local.recipe)
        experiment, notes = replace(experiment, data=data, recorded=recipe, folder=resumed), notes + more
    if config.run.steps and config.run.steps > experiment.steps:
        raise ConfigError(
            f"--steps is {config.run.steps}, but --epochs {config.optim.epochs} come to {experiment.steps} steps; "
            "choose fewer steps, or more epochs"
        )
    if not config.local.budget or resumed:
        return experiment, notes
    with console.status("looking for what fits the budget ..."):
        experiment, more = choose_for_budget(experiment, open_)
    return experiment, notes + more


def states_of(
    experiment: Experiment, nets: Sequence[LocalNetwork], **place: Any
) -> tuple[TrainingState, Finish | None]:
    """What trains the networks of an experiment: the first, and that of the finish, if there is one.

    Args:
        experiment: what is trained.
        nets: its networks.
        place: which modules this process trains, and with whom; arguments of `TrainingState`.
    """
    config, first = experiment.config, experiment.steps_before_finish
    place |= {"steps_per_epoch": experiment.steps_per_epoch, "device": experiment.device}
    state = TrainingState(nets[0], config.before_finish, **place)
    if len(nets) == 1:
        return state, None
    exact = nets[1]  # and not the first, which would stay alive
    return state, Finish(first, lambda ema: TrainingState(exact, config.in_finish, **place, first=first, ema=ema))


def begin(
    trainer: Trainer, experiment: Experiment, anew: bool, resumed: Path | None, job: str | None = None
) -> list[str]:
    """Writes down what the run is, or returns to its newest checkpoint; gives lines for the user.

    Args:
        trainer: of this process; with a lock on the run folder where this process writes into it.
        experiment: what is trained.
        anew: whether there is no checkpoint to return to.
        resumed: the folder that was to be resumed; None for a new run.
        job: the name of torchrun's job.
    """
    folder, lock = trainer.folder, trainer.outputs.lock
    notes = [lock.note] if lock and lock.note else []
    if anew:
        if lock:
            write_description(folder, experiment, trainer.state.net, job)
        return [*notes, f"{folder} has no checkpoint yet: the run starts anew"] if resumed else notes
    notes += trainer.resume()
    # The test accuracy of a run that --steps had stopped is not that of its end.
    trainer.tests_at_end = tested_before(folder) is None or trainer.state.step < trainer.last_step
    if lock:
        note_resumption(folder)
    return notes


def announce(console: Console, experiment: Experiment, net: LocalNetwork, folder: Path, place: str) -> None:
    """Shows what is about to be trained, and where: `place` are the devices and processes."""
    side, count = experiment.data.img_size, len(net.local_modules)
    modules = counted(count, "module") + (" trained exactly" if net.exact else "")
    if own := experiment.config.finish_epochs:
        modules = f"{counted(count, 'module')}, trained exactly in the last {counted(own, 'epoch')}"
    console.out(printable(f"{experiment.title} at {side}x{side}: {modules}, {place}"), highlight=False)
    console.out(printable(f"run folder: {folder}"), highlight=False)
    if units := not_run_again(net):
        line = f"--recompute-units: backward does not run {listing(units)} again, which a head reads ahead (--reach)"
        console.out(printable(line), highlight=False)


def not_run_again(net: LocalNetwork) -> list[str]:
    """The units that `recompute_units` would let run again, if no head read them ahead."""
    if net.recipe is None or not net.recipe.recompute_units:
        return []
    named = replace(net.recipe, grad_checkpointing=False)  # which never means these
    ahead = (unit for module in net.local_modules for unit in module.units[: module.shared])
    return [unit for unit in ahead if runs_again(named.recomputation(unit, last=False))]


def train(trainer: Trainer, experiment: Experiment, console: Console, notes: list[str]) -> None:
    """Trains, and shows progress, what came out, and what to do next; `notes` are lines to show first."""
    config, folder, evaluated_on = experiment.config, trainer.folder, experiment.data.evaluated_on
    count = trainer.outputs.curve.modules
    progress = Progress(
        console,
        config.optim.epochs,
        experiment.steps_per_epoch,
        config.optim.batch_size,
        count,
        trainer.outputs.rows,
        evaluated_on,
        experiment.data.task.unit,
        trainer.last_step,
    )
    with progress:
        for note in notes:
            progress.note(note)
        rows = trainer.run(progress)
    if not trainer.stage.reports:
        return
    if trainer.tested:
        note_tested(folder, trainer.tested)
    net = trainer.state.net
    modules = range(len(net.local_modules))
    names = [units_of(net, modules)] if count == 1 else [units_of(net, range(k, k + 1)) for k in modules]
    console.print(final_table(rows, names, evaluated_on, trainer.gauge.reserved))
    if line := tested_line(folder, experiment.data.task):
        console.out(line, highlight=False)
    backbone = config.backbone
    weights, kwargs = folder / WEIGHTS, experiment.model_kwargs
    task = None if config.data.task == DataConfig.task else config.data.task
    steps = next_steps(folder, weights, backbone.model, kwargs, backbone.plugin, task, backbone.starts_trained)
    console.out(steps, highlight=False)
    if trainer.last_step < experiment.steps:
        stopped = f"Stopped after step {trainer.last_step} of {experiment.steps}. Train on:"
        console.out(f"{stopped}\n\n{resume_command(folder, backbone.plugin)}\n", highlight=False)


def show_interruption(stop: Interrupted, trainer: Trainer) -> None:
    """Says that a run was stopped, and how to resume it."""
    print(f"localprop: {stop}\nresume with: {command_to_resume(trainer)}", file=sys.stderr)


def command_to_resume(trainer: Trainer) -> str:
    """The command that continues a run that was cut off."""
    config = trainer.config
    return resume_command(trainer.folder, config.backbone.plugin, config.run.steps)


def units_of(net: LocalNetwork, modules: range) -> str:
    """The units of consecutive modules: the name of the only one, or of the first and the last."""
    units = [unit for k in modules for unit in net.local_modules[k].units]
    return units[0] if len(units) == 1 else f"{units[0]} ... {units[-1]}"
