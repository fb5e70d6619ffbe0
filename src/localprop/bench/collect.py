"""From a finished run folder to its record."""

import math
import statistics
from pathlib import Path
from typing import Any

from localprop.bench.record import Record, settings_of
from localprop.bench.suite import SuiteRun
from localprop.errors import BenchError
from localprop.report.losses import read_losses
from localprop.report.measures import ACCURACY, Measure
from localprop.report.results import EpochRow, read_results
from localprop.runs.description import measures_of, read_description
from localprop.runs.recorded_settings import read_config, recorded_plugin
from localprop.settings.flat import free, to_flat
from localprop.training.outputs import LOSSES, RESULTS

# What a run fills in where the suite leaves it open.
_FILLED = ("img_size", "model_kwargs", "hflip", "head", "kinetic", "reach")
_CHOSEN = ("modules", "cuts", "split_blocks", "recompute", "grad_checkpointing", "recompute_units")  # for a budget


def differing(found: dict[str, Any], run: SuiteRun) -> str | None:
    """The setting by which a result with the settings `found` is not of this run, in words; None where it is."""
    for key, value in settings_of(run.config).items():
        open_ = (key in _FILLED and value is None) or (run.config.local.budget and key in _CHOSEN)
        if not open_ and found.get(key) != value:
            return f"{key} is {value} in the suite, and {found.get(key)} there"
    return None


def settings_in(folder: Path, run: SuiteRun) -> dict[str, Any]:
    """The settings of a run folder, with the suite's name for its data, and with the suite's where it records none.

    Raises:
        CheckpointError, ConfigError: it is no run folder, or damaged.
    """
    found, own = settings_of(read_config(folder)), to_flat(run.config)
    found |= {name: own[name] for name in free("config") if name in found}
    return found | {"data": run.config.data.data, "plugin": recorded_plugin(folder)}


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
    description, losses = read_description(folder), read_losses(folder / LOSSES)
    measures = measures_of(description)
    rows = read_results(folder / RESULTS, measures)
    if not rows or not losses:
        raise BenchError(f"{folder} has no results; delete it to run it again")
    last = rows[-1]
    steps = run.config.run.steps or description["steps"]
    if last.step != steps:
        raise BenchError(f"{folder} ends with step {last.step} of {steps}; delete it to run it again")
    return Record(
        suite=suite,
        run=run.name,
        axes=run.axes,
        result=_result(run, description, measures[0], last, losses),
        cost=_cost(rows, losses, description) | {"jobs": jobs, "device": description["device"]},
        network=_network(description),
        data=_data(folder, run, description),
        config=settings_in(folder, run),
        provenance=description["provenance"] | {"resumed_with": description.get("resumed_with", [])},
    )


def _headline(measure: Measure, heads: list[float | None]) -> dict[str, Any]:
    """The entries of `Record.result` for the headline of each module's head, the network's last."""
    if measure == ACCURACY:
        return {"accuracy": heads[-1], "module_accuracies": heads}
    scores = [_finite(value) for value in heads]
    none = {"accuracy": None, "module_accuracies": [None for _ in heads]}
    return {**none, "measure": measure.record(), "score": scores[-1], "module_scores": scores}


def _finite(loss: float | None) -> float | None:
    """A loss as JSON can hold it; None for one that overflowed in a step that the loss scale skipped."""
    return loss if loss is not None and math.isfinite(loss) else None


def _result(
    run: SuiteRun, description: dict[str, Any], headline: Measure, last: EpochRow, losses: list[list[float]]
) -> dict[str, Any]:
    # Labels of random pixels are no better than random.
    meaningless = run.config.data.data == "synthetic"
    return {
        "evaluated_on": description["evaluated_on"],
        **_headline(headline, [None if meaningless else value for value in last.heads]),
        "top5": None if meaningless else last.score("top5"),
        "loss": _finite(last.score("loss")),
        "epochs": last.epoch,
        "steps": last.step,
        **({"test": description["test"]} if "test" in description else {}),
        "curve": {"step": [int(row[0]) for row in losses], "loss": [list(map(_finite, row[3:])) for row in losses]},
    }


def _network(description: dict[str, Any]) -> dict[str, Any]:
    keys = ("model", "model_kwargs", "modules", "parameters", "auxiliary_parameters")
    # Version 0.1 recorded no recipe.
    return {key: description[key] for key in (*keys, *(["recipe"] if "recipe" in description else []))}


def _data(folder: Path, run: SuiteRun, description: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": run.config.data.data,
        "source": "folder" if read_config(folder).data.data.startswith("folder:") else "named",
        "train_images": description["train_images"],
        "evaluated_images": description["evaluated_images"],
        "img_size": description["input_size"][-1],
        "classes": len(description["classes"]),
        "identity": description.get("data_identity"),
    }


def _cost(rows: list[EpochRow], losses: list[list[float]], description: dict[str, Any]) -> dict[str, Any]:
    last, finish = rows[-1], description.get("finish", {}).get("after_step", math.inf)
    return {
        "predicted_memory": last.predicted_memory,
        "peak_memory": last.peak_memory,
        "seconds_per_step": _typical([(row[0], row[1]) for row in losses], finish),
        "processor_seconds_per_step": _typical([(row[0], row[2]) for row in losses], finish),
        "images_per_second": _typical([(row.step, row.examples_per_second) for row in rows], finish),
        "seconds": last.seconds,
    }


def _typical(values: list[tuple[float, float]], finish: float) -> float:
    """The median of (step, value) pairs; with a finish the mean of the medians before and in it, by their lengths.

    Of the means between two moments: a checkpoint, or another program, disturbs few of them.

    Args:
        values: at ascending steps.
        finish: the step after which the finish begins, whose steps take another time.
    """
    parts = [[value for step, value in values if (step > finish) == late] for late in (False, True)]
    ends = [0.0, min(finish, values[-1][0]), values[-1][0]]
    lengths = [ends[i + 1] - ends[i] for i in range(2) if parts[i]]
    medians = [statistics.median(part) for part in parts if part]
    return sum(m * n for m, n in zip(medians, lengths, strict=True)) / sum(lengths) if len(medians) > 1 else medians[0]
