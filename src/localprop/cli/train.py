"""`localprop train`."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from localprop.cli.common import named_plugin, take_config_files, typed, with_files
from localprop.errors import ConfigError
from localprop.settings.config import TrainConfig
from localprop.settings.flags import parse
from localprop.settings.flat import free, to_flat
from localprop.settings.rates import with_usual_rates
from localprop.settings.recipe import END_TO_END
from localprop.settings.trust import require_typed

_NEWEST = "newest"


def prepare(argv: Sequence[str]) -> Callable[[], int]:
    """Reads the flags of `train`, and imports what trains. `-c FILE.yaml` sets defaults; flags win."""
    flags = argv
    argv, files = take_config_files(argv)
    argv = _with_newest(argv)
    words = ("train", *flags)
    config: TrainConfig = parse(TrainConfig, "train", argv, with_files(TrainConfig(), files, words))
    if config.run.resume is None:
        named = typed(argv, files)
        asks = named & {"method", "modules", "cuts", "reach", "finish"}
        if config.local.budget is not None and not asks:
            config = replace(config, local=replace(config.local, method=END_TO_END))
        return _start(
            with_usual_rates(config, named), None, flags, not asks and not named & {"freeze", "freeze_modules"}
        )
    from localprop.runs.folder import newest_run, starts_anew
    from localprop.runs.recorded_settings import CONFIG, read_config

    folder = newest_run(config.run.output) if config.run.resume == _NEWEST else Path(config.run.resume)
    own = read_config(folder, named_plugin(folder, config.backbone.plugin, words))
    if starts_anew(folder):  # else the weights that it began with are not loaded again
        weights = {name: getattr(own.backbone, name) for name in ("model", "model_kwargs", "initial_checkpoint")}
        require_typed(weights, str(folder / CONFIG), words)
    config = parse(TrainConfig, "train", argv, with_files(own, files, words))
    _require_same_run(own, config, folder)
    return _start(config, folder, flags)


def _require_same_run(own: TrainConfig, config: TrainConfig, folder: Path) -> None:
    """Raises a ConfigError where a setting differs from the run's `own` that may not change when it is resumed."""
    before, after = to_flat(own), to_flat(config)
    may_differ = free("resume")
    if all(settings["data"].startswith("folder:") for settings in (before, after)):
        may_differ.add("data")  # a folder may have moved
    for key, value in after.items():
        if value != before[key] and key not in may_differ:
            flag = key.replace("_", "-")
            raise ConfigError(f"--{flag} was {before[key]} when {folder} began; resume without it, or start a new run")


def _start(config: TrainConfig, resumed: Path | None, flags: Sequence[str], open_: bool = False) -> Callable[[], int]:
    """Training in this process, or a start of as many as are asked for.

    Args:
        config: the settings.
        resumed: the folder of the run that is resumed; None for a new one.
        flags: those that were typed.
        open_: whether nothing asks for a way to train, so that a budget chooses it.
    """
    # torchrun, or this very function, started this process as one of several.
    if config.run.parallel and "RANK" not in os.environ:
        from localprop.parallel import job  # noqa: F401 - launch needs torch, too, to check the settings
        from localprop.parallel.launch import launch

        if config.run.nproc is None:
            raise ConfigError("--parallel needs --nproc, the number of processes, or a start by torchrun")
        return partial(launch, config, config.run.nproc, flags)
    from localprop.runs.run import run

    return partial(run, config, resumed, open_)


def _with_newest(argv: list[str]) -> list[str]:
    """Lets `--resume` stand alone: it then means the newest run."""
    result = []
    for i, word in enumerate(argv):
        result.append(word)
        if word == "--resume" and (i + 1 == len(argv) or argv[i + 1].startswith("-")):
            result.append(_NEWEST)
    return result
