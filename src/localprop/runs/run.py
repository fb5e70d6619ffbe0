"""A run: from its settings to the table at its end, alone or as one of several processes."""

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from localprop.errors import (
    CheckpointError,
    ConfigError,
    LocalpropError,
    NonFiniteLossError,
    OutOfMemory,
    ParallelError,
    PlanError,
    counted,
    printable,
)
from localprop.network.network import LocalNetwork
from localprop.parallel.agreement import data_facts, difference, facts
from localprop.parallel.job import Job, Lost, in_job, meet
from localprop.parallel.pipeline import PipelineStage
from localprop.parallel.placement import Layout, arrange
from localprop.planning.processes import in_flight
from localprop.planning.simulation import simulate_step
from localprop.report.formats import format_bytes
from localprop.report.progress import Progress
from localprop.report.summary import final_table, next_steps
from localprop.runs import advice
from localprop.runs.description import data_of_run, note_resumption, note_tested, tested_before, write_description
from localprop.runs.experiment import Experiment, prepare
from localprop.runs.folder import create_run_folder, is_unbegun, left_by
from localprop.settings.config import TrainConfig, require_equal_parts
from localprop.system.commands import resume_command
from localprop.system.launched import Ranks, describe_ranks, leave, leave_failure
from localprop.system.lock import FolderLock
from localprop.training.checkpoints.folder import has_checkpoint
from localprop.training.outputs import CHECKPOINTS, WEIGHTS
from localprop.training.signals import Interrupted
from localprop.training.state import TrainingState
from localprop.training.trainer import Trainer


def run(config: TrainConfig, resumed: Path | None) -> int:
    """Trains, in this process alone or as one of those of `--parallel`; returns the exit code.

    Args:
        config: the settings.
        resumed: the folder of the run to go on with; None for a new one.

    Raises:
        LocalpropError: see there.
    """
    if not config.run.parallel:
        if in_job() and os.environ["WORLD_SIZE"] != "1":
            raise ConfigError("torchrun started several processes, which would all do the same; add --parallel modules")
        return _run_alone(config, resumed)
    job = meet(config.run.device)
    code = 1
    try:
        job.agree(facts(config, resumed, job.device.type))
        job.connect()
        code = _run_together(config, resumed, job)
    except LocalpropError as error:
        code = _tell(error, job)
    except (BrokenPipeError, SystemExit):  # whom it is piped to has read enough: rich makes an exit of that
        job.first_to_fail()
        code = 128 + signal.SIGPIPE
    except Exception:
        if job.first_to_fail():
            traceback.print_exc()
    if code:
        with suppress(BrokenPipeError):
            sys.stdout.flush()
            sys.stderr.flush()
        leave(code)  # what is still in flight would be waited for, and the other side may be gone
    return code


def _run_alone(config: TrainConfig, resumed: Path | None) -> int:
    with ExitStack() as locks:
        # Before anything is loaded: what the folder holds must not change meanwhile.
        lock = locks.enter_context(FolderLock(resumed)) if resumed else None
        return _run_locked(config, resumed, lock, locks)


def _run_locked(config: TrainConfig, resumed: Path | None, lock: FolderLock | None, locks: ExitStack) -> int:
    """Trains in this process alone; `lock` is on the folder that is resumed, and `locks` takes that of a new one."""
    console, anew = Console(), resumed is None or is_unbegun(resumed)
    experiment, notes = _prepare(config, resumed, anew, console)
    config = experiment.config
    net = experiment.localize()
    headroom = advice.Headroom(experiment)
    predicted, warning = advice.predict(experiment, net, headroom)
    state = TrainingState(net, config.optim, _steps(experiment), experiment.device)
    folder = resumed or create_run_folder(config)
    lock = lock or locks.enter_context(FolderLock(folder))
    data, device = experiment.data, experiment.device
    trainer = Trainer(state, data, config, folder, device, experiment.title, predicted, lock=lock)
    notes += _begin(trainer, experiment, anew, resumed)
    _announce(console, experiment, net, folder, str(device))
    try:
        _train(trainer, experiment, console, [*notes, *warning])
    except Interrupted as stop:
        _tell_how_to_resume(stop, trainer)
        return stop.exit_code
    except MemoryError as error:
        del trainer, state, net
        raise headroom.explain(error, predicted) from None
    return 0


def _begin(
    trainer: Trainer, experiment: Experiment, anew: bool, resumed: Path | None, job: str | None = None
) -> list[str]:
    """Writes down what the run is, or returns to its newest checkpoint; gives lines for the user.

    Args:
        trainer: of this process; with a lock on the run folder where this process writes into it.
        experiment: what is trained.
        anew: whether there is no checkpoint to return to.
        resumed: the folder that was to be resumed; None for a new run.
        job: names torchrun's job.
    """
    folder, lock = trainer.folder, trainer.outputs.lock
    notes = [lock.note] if lock and lock.note else []
    if anew:
        if lock:
            write_description(folder, experiment, trainer.net, job)
        return [*notes, f"{folder} has no checkpoint yet: the run starts anew"] if resumed else notes
    notes += trainer.resume()
    # What the test images came to after an earlier --steps is not what the run comes to.
    trainer.tests_at_end = tested_before(folder) is None or trainer.state.step < trainer.last_step
    if lock:
        note_resumption(folder)
    return notes


def _tell_how_to_resume(stop: Interrupted, trainer: Trainer) -> None:
    print(f"localprop: {stop}\nresume with: {_resume_command(trainer)}", file=sys.stderr)


def _resume_command(trainer: Trainer) -> str:
    config = trainer.config
    return resume_command(trainer.folder, config.backbone.plugin, config.run.steps)


def _run_together(config: TrainConfig, resumed: Path | None, job: Job) -> int:
    placed = replace(config, run=replace(config.run, device=str(job.device)))
    anew = job.gather(resumed is None or is_unbegun(resumed))[0]
    experiment, notes = _prepare(placed, resumed, anew, Console(quiet=job.rank > 0))
    experiment = replace(experiment, config=replace(experiment.config, run=config.run))
    config = experiment.config
    if line := difference(job.gather(data_facts(experiment.data.identity))):
        raise ParallelError(line)
    net = experiment.localize()
    layout = arrange(config.run.parallel or "modules", len(net.local_modules), job.size, _seconds(experiment, net, job))
    require_equal_parts(config.optim.batch_size, config.optim.micro_batches, layout.replicas)
    stage = PipelineStage(job, layout, net, config.run.trace)
    names = [_describe(net, layout, rank) for rank in range(job.size)]
    with _blamed(job, names):
        trainer, more = _set_up(experiment, net, layout, stage, resumed, anew, job)
        if job.rank == 0:
            describe_ranks(Ranks(names, str(trainer.folder), str(trainer.folder / CHECKPOINTS)))
    # What all processes would say, one does; an image that cannot be read is told of by who reads it.
    console, notes = (Console(), notes + more) if stage.reports else (Console(force_interactive=False), [])
    if stage.reports:
        _announce(console, experiment, net, trainer.folder, f"{layout}, {experiment.device.type}")
    try:
        with _blamed(job, names, trainer):
            _train(trainer, experiment, console, notes)
            _say(stage.write_trace(names, trainer.folder, experiment.title))
    except Interrupted as stop:
        _say(stage.write_trace(names, trainer.folder, experiment.title))
        if stage.reports:
            _tell_how_to_resume(stop, trainer)
        job.wait_for_all()
        return stop.exit_code
    finally:
        if trainer.outputs.lock:
            trainer.outputs.lock.release()
    job.leave()
    return 0


def _set_up(
    experiment: Experiment,
    net: LocalNetwork,
    layout: Layout,
    stage: PipelineStage,
    resumed: Path | None,
    anew: bool,
    job: Job,
) -> tuple[Trainer, list[str]]:
    """What trains in this process, at the place where the run goes on; and lines for the user."""
    config, device = experiment.config, experiment.device
    predicted, notes = _predict(experiment, net, layout, job)
    if not stage.needs_images:
        experiment.data.release()
    state = TrainingState(net, config.optim, _steps(experiment), device, stage.modules, stage.average, stage.span)
    lock = None
    if stage.reports:
        left = left_by(job.name, config) if job.name and job.attempt and not resumed else None
        lock = FolderLock(resumed or left or create_run_folder(config))
        if left and not is_unbegun(left):
            anew = False
            data_of_run(left, experiment.data)
        if resumed and is_unbegun(resumed) != anew:
            raise CheckpointError(f"another process has used {resumed} meanwhile; start the same command again")
    name, anew = job.gather([str(lock.folder), anew] if lock else None)[layout.reporter]
    folder = Path(name)
    trainer = Trainer(state, experiment.data, config, folder, device, experiment.title, predicted, stage, lock)
    return trainer, notes + _begin(trainer, experiment, anew, resumed, job.name)


@contextmanager
def _blamed(job: Job, names: list[str], trainer: Trainer | None = None) -> Iterator[None]:
    """Puts into an error in which process it came, and what that trains; once there is a trainer, how to go on."""
    who = f"rank {job.rank} ({names[job.rank]})"
    try:
        yield
    except MemoryError as error:
        expected = f"at most {format_bytes(trainer.predicted)} predicted; " if trainer and trainer.predicted else ""
        raise OutOfMemory(
            f"{who}: out of memory on {job.device} ({expected}{error}); take more modules and processes, or more "
            "--micro-batches"
        ) from None
    except NonFiniteLossError as error:  # which names the module
        raise ParallelError(f"rank {job.rank}: {error}") from error
    except Lost as error:
        saved = trainer is not None and has_checkpoint(trainer.folder / CHECKPOINTS)
        again = _resume_command(trainer) if trainer else ""
        raise Lost(f"{error}; resume with: {again}" if saved else str(error)) from error
    except LocalpropError as error:
        raise ParallelError(f"{who}: {error}") from error


def _say(line: str | None) -> None:
    if line:
        print(line)


def _tell(error: LocalpropError, job: Job) -> int:
    """Says why this process fails, if it is the first that does; gives its exit code.

    The others only see that it is gone. One that was killed says nothing: then the first that misses it does, or leaves
    that to a `launch`, which may know more.
    """
    lost = isinstance(error, Lost)
    if job.first_to_fail():
        line = f"rank {job.rank} ends: {error}" if lost else str(error)
        if not (lost and leave_failure(line)):
            print(f"localprop: {printable(line)}", file=sys.stderr)
    return 1 if lost else 2


def _prepare(config: TrainConfig, resumed: Path | None, anew: bool, console: Console) -> tuple[Experiment, list[str]]:
    experiment = prepare(config, weights=anew)
    notes = experiment.data.notes
    if resumed and not anew:
        data, more = data_of_run(resumed, experiment.data)
        experiment, notes = replace(experiment, data=data), notes + more
    steps, whole = config.run.steps, _steps(experiment) * config.optim.epochs
    if steps and steps > whole:
        raise ConfigError(
            f"--steps is {steps}, but --epochs {config.optim.epochs} come to {whole} steps; choose fewer steps, or "
            "more epochs"
        )
    if not config.local.budget or resumed:
        return experiment, notes
    with console.status("looking for what fits the budget ..."):
        experiment, note = advice.fit(experiment)
    return experiment, [*notes, note]


def _steps(experiment: Experiment) -> int:
    return experiment.data.steps_per_epoch(experiment.config.optim.batch_size)


def _seconds(experiment: Experiment, net: LocalNetwork, job: Job) -> list[float] | None:
    """Expected time of each module, where several have to share a process; None where it cannot be known."""
    if experiment.config.run.parallel == "data" or not 1 < job.size < len(net.local_modules):
        return None
    optim = experiment.config.optim
    try:
        trace = simulate_step(net, optim, optim.batch_size, experiment.input_size, experiment.device.type)
    except PlanError:
        return None
    return trace.module_seconds


def _predict(experiment: Experiment, net: LocalNetwork, layout: Layout, job: Job) -> tuple[int | None, list[str]]:
    """The largest predicted peak of a process in bytes, None where it cannot be known; and lines for the user."""
    optim, (stage, _) = experiment.config.optim, layout.place(job.rank)
    step = (optim, optim.batch_size // layout.replicas, experiment.input_size, experiment.device.type)
    own: tuple[int, int] | str
    try:
        trace = simulate_step(net, *step, layout.stages[stage], layout.replicas)
        own = trace.peak, trace.entry
    except PlanError as error:
        own = str(error)
    known = job.gather(own)[: len(layout.stages)]  # replicas take the same
    problems = [line for line in known if isinstance(line, str)]
    if problems:
        return None, problems[:1]
    held = in_flight([entry for _, entry in known])
    peaks = [peak + more for (peak, _), more in zip(known, held, strict=True)]
    rank = peaks.index(max(peaks))
    return peaks[rank], [
        f"peak memory of a step: {format_bytes(peaks[rank])} at most in a process, rank {rank} (predicted)"
    ]


def _announce(console: Console, experiment: Experiment, net: LocalNetwork, folder: Path, place: str) -> None:
    side, count = experiment.data.img_size, len(net.local_modules)
    modules = counted(count, "module")
    console.out(printable(f"{experiment.title} at {side}x{side}: {modules}, {place}"), highlight=False)
    console.out(printable(f"run folder: {folder}"), highlight=False)


def _train(trainer: Trainer, experiment: Experiment, console: Console, notes: list[str]) -> None:
    """Trains, and shows how it goes on and what came out."""
    config, folder, net = experiment.config, trainer.folder, trainer.net
    evaluated_on, count = experiment.data.evaluated_on, len(net.local_modules)
    progress = Progress(
        console,
        config.optim.epochs,
        _steps(experiment),
        config.optim.batch_size,
        count,
        trainer.outputs.rows,
        evaluated_on,
        trainer.last_step,
    )
    with progress:
        for note in notes:
            progress.note(note)
        rows = trainer.run(progress)
    if trainer.stage.reports:
        if trainer.tested:
            note_tested(folder, trainer.tested)
        console.print(final_table(rows, [_span(net, range(k, k + 1)) for k in range(count)], evaluated_on))
        if tested := tested_before(folder):
            console.out(f"test accuracy {tested['accuracy']:.2f}%, of {tested['images']} images", highlight=False)
        steps = next_steps(
            folder, folder / WEIGHTS, config.backbone.model, experiment.model_kwargs, config.backbone.plugin
        )
        console.out(steps, highlight=False)
        whole = _steps(experiment) * config.optim.epochs
        if trainer.last_step < whole:
            again = resume_command(folder, config.backbone.plugin)
            console.out(f"Stopped after step {trainer.last_step} of {whole}. Train on:\n\n{again}\n", highlight=False)


def _describe(net: LocalNetwork, layout: Layout, rank: int) -> str:
    """What a process trains, for messages."""
    (stage, replica), count = layout.place(rank), len(net.local_modules)
    modules = layout.stages[stage]
    number = f"module {modules[0] + 1}" if len(modules) == 1 else f"modules {modules[0] + 1} to {modules[-1] + 1}"
    which = f", replica {replica + 1} of {layout.replicas}" if layout.replicas > 1 else ""
    return f"{number} of {count}{which}: {_span(net, modules)}"


def _span(net: LocalNetwork, modules: range) -> str:
    units = [unit for k in modules for unit in net.local_modules[k].units]
    return units[0] if len(units) == 1 else f"{units[0]} ... {units[-1]}"
