"""From a finished run folder to its record."""

import statistics
from pathlib import Path
from typing import Any

from localprop.bench.record import Record
from localprop.bench.suite import SuiteRun
from localprop.config import from_flat, to_flat
from localprop.errors import BenchError
from localprop.experiment import read_config, read_description
from localprop.report import EpochRow, read_losses, read_results
from localprop.trainer import LOSSES, RESULTS

# Places of one machine, and what decides nothing but how long something takes to be saved.
_LOCAL = ("output", "experiment", "resume", "data_dir", "device", "workers", "download", "checkpoint_hist")


def settings_of(config: Any) -> dict[str, Any]:
    """Every setting but for those that name places of one machine."""
    return {key: value for key, value in to_flat(config).items() if key not in _LOCAL}


def collect(folder: Path, suite: str, run: SuiteRun, jobs: int) -> Record:
    """Reads the record of a run that has come to its end.

    Args:
        folder: the run folder.
        suite: name of the suite.
        run: which of its runs.
        jobs: runs at once.

    Raises:
        CheckpointError: a file of the run folder is missing or damaged.
        BenchError: the run has not come to its end.
    """
    description, rows, losses = read_description(folder), read_results(folder / RESULTS), read_losses(folder / LOSSES)
    last = rows[-1]
    if last.epoch != run.config.optim.epochs:
        raise BenchError(f"{folder} ends with epoch {last.epoch} of {run.config.optim.epochs}; run the suite again")
    # What the run has filled in, such as model_kwargs, under the names that the suite has for its data.
    filled = settings_of(read_config(folder)) | {"data": run.config.data.data}
    return Record(
        suite=suite,
        run=run.name,
        axes=run.axes,
        result={
            "evaluated_on": description["evaluated_on"],
            "accuracy": last.accuracy,
            "module_accuracies": list(last.test_accuracies),
            "top5": last.test_top5,
            "loss": last.test_loss,
            "epochs": last.epoch,
            "steps": last.step,
            "curve": {"step": [int(row[0]) for row in losses], "loss": [row[2:] for row in losses]},
        },
        cost=_cost(rows, losses) | {"jobs": jobs},
        network={key: description[key] for key in ("model", "model_kwargs", "modules", "parameters")}
        | {"auxiliary_parameters": description["auxiliary_parameters"]},
        data={
            "name": run.config.data.data,
            "source": "folder" if read_config(folder).data.data.startswith("folder:") else "named",
            "train_images": description["train_images"],
            "evaluated_images": description["evaluated_images"],
            "img_size": description["input_size"][-1],
            "classes": len(description["classes"]),
        },
        config=filled,
        provenance=description["provenance"],
    )


def _cost(rows: list[EpochRow], losses: list[list[float]]) -> dict[str, Any]:
    last = rows[-1]
    return {
        "predicted_memory": last.predicted_memory,
        "peak_memory": last.peak_memory,
        # Of the means between two moments: a checkpoint, or another program, disturbs few of them.
        "seconds_per_step": statistics.median(row[1] for row in losses),
        "images_per_second": statistics.median(row.images_per_second for row in rows),
        "seconds": last.seconds,
    }


def differing(record: Record, run: SuiteRun) -> str | None:
    """The setting by which a record is not of this run, or None; what a run fills in itself does not count."""
    for key, value in settings_of(run.config).items():
        if value is not None and key in record.config and record.config[key] != value:
            return f"{key} is {value}, and was {record.config[key]}"
    return None


def with_places(run: SuiteRun, places: dict[str, Any]) -> Any:
    """The run's config with what depends on the machine: folders, device."""
    return from_flat(places, "bench", run.config)
