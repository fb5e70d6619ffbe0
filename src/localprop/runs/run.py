"""A run: from its settings to the table at its end."""

import os
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from localprop.errors import ConfigError
from localprop.parallel.job import in_job
from localprop.runs.common import announce, begin, prepare_run, show_interruption, states_of, train
from localprop.runs.folder import create_run_folder, starts_anew
from localprop.runs.headroom import Headroom, predict
from localprop.runs.repeatable import repeatable_kernels
from localprop.runs.together import run_together
from localprop.settings.config import TrainConfig
from localprop.system.lock import FolderLock
from localprop.training.signals import Interrupted
from localprop.training.trainer import Trainer


def run(config: TrainConfig, resumed: Path | None, open_: bool = False) -> int:
    """Trains, in this process alone or as one of those of `--parallel`; returns the exit code.

    Args:
        config: the settings.
        resumed: the folder of the run that is resumed; None for a new one.
        open_: whether nothing asks for a way to train, so that a budget chooses it.

    Raises:
        LocalpropError: see there.
    """
    if config.run.parallel:
        return run_together(config, resumed, open_)
    with repeatable_kernels(config.run.deterministic):
        return _run_alone(config, resumed, open_)


def _run_alone(config: TrainConfig, resumed: Path | None, open_: bool) -> int:
    """Trains in this process alone."""
    if in_job() and os.environ["WORLD_SIZE"] != "1":
        raise ConfigError("torchrun started several processes, which would all do the same; add --parallel modules")
    with ExitStack() as locks:
        # Before anything is loaded: what the folder holds must not change meanwhile.
        lock = locks.enter_context(FolderLock(resumed)) if resumed else None
        return _train_alone(config, resumed, lock, locks, open_)


def _train_alone(
    config: TrainConfig, resumed: Path | None, lock: FolderLock | None, locks: ExitStack, open_: bool
) -> int:
    """Trains; `lock` is on the folder that is resumed, and `locks` takes that of a new one."""
    console, anew = Console(), resumed is None or starts_anew(resumed)
    experiment, notes = prepare_run(config, resumed, anew, console, open_)
    config, data, device = experiment.config, experiment.data, experiment.device
    nets = experiment.networks()
    headroom = Headroom(experiment)
    predicted, warning = predict(experiment, nets, headroom)
    state, finish = states_of(experiment, nets)
    folder = resumed or create_run_folder(config)
    lock = lock or locks.enter_context(FolderLock(folder))
    trainer = Trainer(state, data, config, folder, device, experiment.title, predicted, lock=lock, finish=finish)
    del state, nets  # which would keep what is given up at the finish
    notes += begin(trainer, experiment, anew, resumed)
    announce(console, experiment, trainer.state.net, folder, str(device))
    try:
        train(trainer, experiment, console, [*notes, *warning])
    except Interrupted as stop:
        show_interruption(stop, trainer)
        return stop.exit_code
    except MemoryError as error:
        del trainer
        raise headroom.explain(error, predicted) from None
    return 0
