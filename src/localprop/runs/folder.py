"""Run folders: making one, and finding an old one."""

import datetime
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from localprop.errors import CheckpointError, ConfigError, LocalpropError
from localprop.runs.description import read_description
from localprop.runs.recorded_settings import CONFIG, settings_text
from localprop.settings.config import TrainConfig
from localprop.system.lock import require_new_folder
from localprop.system.reading import Malformed, read_text
from localprop.training.checkpoints.folder import has_checkpoint
from localprop.training.outputs import CHECKPOINTS, RESULTS, WEIGHTS


def create_run_folder(config: TrainConfig) -> Path:
    """A new folder for a run.

    Raises:
        ConfigError: the folder exists already, or cannot be made.
    """
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    data = Path(config.data.data.removeprefix("folder:")).name
    base = config.run.experiment or f"{stamp}-{data}-{config.local.method}"
    for suffix in ["", *(f"-{i}" for i in range(2, 100))]:
        # Again each time: another run may have made it just now.
        require_new_folder(config.run.output, config.run.experiment)
        folder = config.run.output / (base + suffix)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if config.run.experiment:  # an empty one
                return folder
        except OSError as error:
            raise ConfigError(f"cannot make the run folder {folder}: {error.strerror}; choose --output") from None
    raise ConfigError(f"{folder} and a hundred more exist already; choose another --experiment")


def folder_of_job(job: str, config: TrainConfig) -> Path | None:
    """The run folder that an earlier attempt of a job began; None if there is none.

    Names of jobs are torchrun's, and often no more than "none": a run is that job's if its settings are the same, too.
    """
    try:
        named = config.run.experiment
        folder = config.run.output / named if named else newest_run(config.run.output)
        same = read_description(folder).get("job") == job and read_text(folder / CONFIG) == settings_text(config)
        return folder if same else None
    except (LocalpropError, OSError, Malformed):
        return None


def newest_run(output: Path) -> Path:
    """The run folder under `output`, at any depth, that was written to last among those that can be resumed.

    A run without a checkpoint is taken only where no run has one.

    Raises:
        CheckpointError: there is none.
    """
    runs = list(_runs_in(output))
    candidates = [run for run in runs if has_checkpoint(run / CHECKPOINTS)] or [run for run in runs if starts_anew(run)]
    if not candidates:
        raise CheckpointError(f"no run to resume in {output}; name one: --resume FOLDER")
    return max(candidates, key=_last_written)


def starts_anew(folder: Path) -> bool:
    """Whether a run ended before its first checkpoint, so that resuming it can only mean to start it anew."""
    return not has_checkpoint(folder / CHECKPOINTS) and not any((folder / name).exists() for name in (RESULTS, WEIGHTS))


def _runs_in(output: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(output):
        if CONFIG in files:
            yield Path(place)
            folders.clear()  # a run holds no other
        folders[:] = [name for name in folders if not name.startswith(".")]
        # A link may lead to a run, and is not searched: it may as well lead to a whole disk.
        for path in (Path(place, name) for name in folders):
            if path.is_symlink() and (path / CONFIG).is_file():
                yield path


def _last_written(run: Path) -> float:
    times = [0.0]
    for path in (run, run / CONFIG, run / CHECKPOINTS):
        with suppress(OSError):  # it is not there, or no more
            times.append(path.stat().st_mtime)
    return max(times)
