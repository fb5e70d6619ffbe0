"""A run as one of several processes: what it trains, what all of them agree on, and who says why it failed."""

import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from localprop.errors import (
    CheckpointError,
    LocalpropError,
    NonFiniteLossError,
    OutOfMemory,
    ParallelError,
    PlanError,
    printable,
)
from localprop.network.network import LocalNetwork
from localprop.parallel.agreement import data_facts, difference, facts
from localprop.parallel.job import Job, Lost, meet
from localprop.parallel.pipeline import PipelineStage
from localprop.parallel.placement import Placement, arrange
from localprop.planning.processes import in_flight
from localprop.planning.simulation import simulate_step
from localprop.report.formats import format_bytes
from localprop.runs.common import (
    announce,
    begin,
    command_to_resume,
    prepare_run,
    show_interruption,
    states_of,
    train,
    units_of,
)
from localprop.runs.experiment import Experiment
from localprop.runs.folder import create_run_folder, folder_of_job, starts_anew
from localprop.runs.recorded_data import data_of_run
from localprop.runs.repeatable import repeatable_kernels
from localprop.settings.bounds import require_equal_parts
from localprop.settings.config import TrainConfig
from localprop.system.launched import Ranks, describe_ranks, leave, leave_failure
from localprop.system.lock import FolderLock
from localprop.training.checkpoints.folder import has_checkpoint
from localprop.training.outputs import CHECKPOINTS
from localprop.training.signals import Interrupted
from localprop.training.trainer import Trainer


def run_together(config: TrainConfig, resumed: Path | None, open_: bool) -> int:
    """Trains as one of the processes of `--parallel`; returns the exit code.

    Where it fails, the process ends here.

    Args:
        config: the settings.
        resumed: the folder of the run that is resumed; None for a new one.
        open_: whether nothing asks for a way to train, so that a budget chooses it.
    """
    job = meet(config.run.device)
    code = 1
    try:
        job.agree(facts(config, resumed, job.device.type))
        job.connect()
        with repeatable_kernels(config.run.deterministic):
            code = _run(config, resumed, job, open_)
    except LocalpropError as error:
        code = _report_failure(error, job)
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


def _run(config: TrainConfig, resumed: Path | None, job: Job, open_: bool) -> int:
    here = replace(config, run=replace(config.run, device=str(job.device)))
    anew = job.gather(resumed is None or starts_anew(resumed))[0]
    experiment, notes = prepare_run(here, resumed, anew, Console(quiet=job.rank > 0), open_)
    experiment = replace(experiment, config=replace(experiment.config, run=config.run))
    config = experiment.config
    if line := difference(job.gather(data_facts(experiment.data.identity))):
        raise ParallelError(line)
    nets = experiment.networks()
    net = nets[0]
    seconds = _seconds(experiment, net, job)
    placement = arrange(config.run.parallel or "modules", len(net.local_modules), job.size, seconds)
    require_equal_parts(config.optim.batch_size, config.optim.micro_batches, placement.replicas)
    stage = PipelineStage(job, placement, net, config.run.trace)
    names = [_describe(net, placement, rank) for rank in range(job.size)]
    with _naming_the_process(job, names):
        trainer, more = _build_trainer(experiment, nets, placement, stage, resumed, anew, job)
        del nets, net  # which would keep what is given up at the finish
        if job.rank == 0:
            describe_ranks(Ranks(names, str(trainer.folder), str(trainer.folder / CHECKPOINTS)))
    # What all processes would say, one does; that an image cannot be read is said by the process that reads it.
    console, notes = (Console(), notes + more) if stage.reports else (Console(force_interactive=False), [])
    if stage.reports:
        announce(console, experiment, trainer.state.net, trainer.folder, f"{placement}, {experiment.device.type}")
    try:
        with _naming_the_process(job, names, trainer):
            train(trainer, experiment, console, notes)
            _print(stage.write_trace(names, trainer.folder, experiment.title))
    except Interrupted as stop:
        _print(stage.write_trace(names, trainer.folder, experiment.title))
        if stage.reports:
            show_interruption(stop, trainer)
        job.wait_for_all()
        return stop.exit_code
    finally:
        if trainer.outputs.lock:
            trainer.outputs.lock.release()
    job.leave()
    return 0


def _build_trainer(
    experiment: Experiment,
    nets: Sequence[LocalNetwork],
    placement: Placement,
    stage: PipelineStage,
    resumed: Path | None,
    anew: bool,
    job: Job,
) -> tuple[Trainer, list[str]]:
    """What trains in this process, at the place where the run begins or resumes; and lines for the user."""
    config, device = experiment.config, experiment.device
    predicted, notes = _predict(experiment, nets, placement, job)
    if not stage.needs_inputs:
        experiment.data.release()
    place = {name: getattr(stage, name) for name in ("modules", "average", "span", "exchange")}
    state, finish = states_of(experiment, nets, **place)
    lock = None
    if stage.reports:
        earlier = folder_of_job(job.name, config) if job.name and job.attempt and not resumed else None
        lock = FolderLock(resumed or earlier or create_run_folder(config))
        if earlier and not starts_anew(earlier):
            anew = False
            data_of_run(earlier, experiment.data)
        if resumed and starts_anew(resumed) != anew:
            raise CheckpointError(f"another process has used {resumed} meanwhile; start the same command again")
    name, anew = job.gather([str(lock.folder), anew] if lock else None)[placement.reporter]
    folder = Path(name)
    title, data = experiment.title, experiment.data
    trainer = Trainer(state, data, config, folder, device, title, predicted, stage, lock, finish)
    return trainer, notes + begin(trainer, experiment, anew, resumed, job.name)


@contextmanager
def _naming_the_process(job: Job, names: list[str], trainer: Trainer | None = None) -> Iterator[None]:
    """Adds to an error in which process it came and what that trains; once there is a trainer, how to resume, too."""
    process = f"rank {job.rank} ({names[job.rank]})"
    try:
        yield
    except MemoryError as error:
        expected = f"at most {format_bytes(trainer.predicted)} predicted; " if trainer and trainer.predicted else ""
        raise OutOfMemory(
            f"{process}: out of memory on {job.device} ({expected}{error}); take more modules and processes, or more "
            "--micro-batches"
        ) from None
    except NonFiniteLossError as error:  # which names the module
        raise ParallelError(f"rank {job.rank}: {error}") from error
    except Lost as error:
        saved = trainer is not None and has_checkpoint(trainer.folder / CHECKPOINTS)
        again = command_to_resume(trainer) if trainer else ""
        raise Lost(f"{error}; resume with: {again}" if saved else str(error)) from error
    except LocalpropError as error:
        raise ParallelError(f"{process}: {error}") from error


def _report_failure(error: LocalpropError, job: Job) -> int:
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


def _print(line: str | None) -> None:
    if line:
        print(line)


def _seconds(experiment: Experiment, net: LocalNetwork, job: Job) -> list[float] | None:
    """Expected time of each module, where several have to share a process; None where it cannot be known."""
    if experiment.config.run.parallel == "data" or not 1 < job.size < len(net.local_modules):
        return None
    optim = experiment.config.optim
    try:
        step = simulate_step(net, optim, optim.batch_size, experiment.input_size, experiment.device.type)
    except PlanError:
        return None
    return step.module_seconds


def _predict(
    experiment: Experiment, nets: Sequence[LocalNetwork], placement: Placement, job: Job
) -> tuple[int | None, list[str]]:
    """The largest predicted peak of a process in bytes, None where it cannot be known; and lines for the user."""
    optim, (stage, _) = experiment.config.optim, placement.place(job.rank)
    batch_size, device = optim.batch_size // placement.replicas, experiment.device.type
    own: tuple[int, int] | str
    try:
        given = optim, batch_size, experiment.input_size, device, placement.stages[stage], placement.replicas
        steps = [simulate_step(net, *given) for net in nets]
        own = max(step.peak for step in steps), steps[0].entry
    except PlanError as error:
        own = str(error)
    known = job.gather(own)[: len(placement.stages)]  # replicas need the same
    problems = [line for line in known if isinstance(line, str)]
    if problems:
        return None, problems[:1]
    waiting = in_flight(nets[0], placement.stages, [entry for _, entry in known])
    peaks = [peak + more for (peak, _), more in zip(known, waiting, strict=True)]
    rank = peaks.index(max(peaks))
    return peaks[rank], [
        f"peak memory of a step: {format_bytes(peaks[rank])} at most in a process, rank {rank} (predicted)"
    ]


def _describe(net: LocalNetwork, placement: Placement, rank: int) -> str:
    """What a process trains, for messages."""
    (stage, replica), count = placement.place(rank), len(net.local_modules)
    modules = placement.stages[stage]
    number = f"module {modules[0] + 1}" if len(modules) == 1 else f"modules {modules[0] + 1} to {modules[-1] + 1}"
    which = f", replica {replica + 1} of {placement.replicas}" if placement.replicas > 1 else ""
    return f"{number} of {count}{which}: {units_of(net, modules)}"
