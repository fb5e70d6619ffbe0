"""results.csv: a row per epoch."""

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from localprop.errors import CheckpointError
from localprop.report.measures import ACCURACIES, Measure
from localprop.system.files import written_aside
from localprop.system.reading import AMOUNT, COUNT, LOSS, NULL, PERCENT, POSITIVE, Malformed, check, read_text

COLUMNS_BEFORE = ("epoch", "step", "lr")
COLUMNS_AFTER = ("predicted_memory", "peak_memory", "seconds")
_ROW = {
    "epoch": POSITIVE,
    "step": POSITIVE,
    "lr": AMOUNT,
    "train_losses": [LOSS],
    "examples_per_second": AMOUNT,
    "predicted_memory": (COUNT, NULL),
    "peak_memory": (COUNT, NULL),
    "seconds": AMOUNT,
}


@dataclass(frozen=True)
class EpochRow:
    """What is known after an epoch: one row of results.csv.

    Args:
        epoch: number of the epoch, from 1. All are complete but for the last one of a run that `--steps` stopped within
            it; what is said of an epoch is then said of its steps so far.
        step: optimizer steps completed.
        lr: learning rate of the last step.
        train_losses: mean local loss over the epoch, one per module.
        heads: the headline score of each module's head, the last being the network's own; None where a module has no
            head, and everywhere after an epoch without evaluation.
        network: the network's score of each of `measures`; None where it has no meaning, and without evaluation.
        examples_per_second: training throughput over the epoch.
        predicted_memory: peak memory of a training step in bytes, as predicted; None where that could not be.
        peak_memory: the same, as measured; None before it has been.
        seconds: wall clock since the run began, summed over resumes.
        measures: what the task measures; the first is the headline.
        unit: what an example is called.
    """

    epoch: int
    step: int
    lr: float
    train_losses: tuple[float, ...]
    heads: tuple[float | None, ...]
    network: tuple[float | None, ...]
    examples_per_second: float
    predicted_memory: int | None
    peak_memory: int | None
    seconds: float
    measures: tuple[Measure, ...] = ACCURACIES
    unit: str = "image"

    @property
    def headline(self) -> float:
        """The network's own headline score; NaN without evaluation."""
        last = self.heads[-1]
        return math.nan if last is None else last

    def score(self, name: str) -> float | None:
        """The network's score of the measure with that name; None where there is none."""
        scores = zip(self.measures, self.network, strict=True)
        return next((value for measure, value in scores if measure.name == name), None)


def write_results(path: Path, rows: Sequence[EpochRow]) -> None:
    """Writes one or more `rows` to a CSV file, in place of what was there.

    Floats are written so that reading gives the same bits; None is an empty cell.
    """
    (headline, *others), modules = rows[0].measures, range(1, len(rows[0].train_losses) + 1)
    columns = [f"train_loss_{k}" for k in modules] + [f"test_{headline.short}_{k}" for k in modules]
    columns += [f"test_{measure.short}" for measure in others] + [f"{rows[0].unit}s_per_second"]
    with written_aside(path) as aside, aside.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow([*COLUMNS_BEFORE, *columns, *COLUMNS_AFTER])
        for row in rows:
            before, after = ([getattr(row, name) for name in names] for names in (COLUMNS_BEFORE, COLUMNS_AFTER))
            scores = [*row.heads, *row.network[1:], row.examples_per_second]
            table.writerow([*before, *row.train_losses, *scores, *after])


def read_results(path: Path, measures: Sequence[Measure] | None = None) -> list[EpochRow]:
    """Reads what `write_results` wrote.

    Args:
        path: the file.
        measures: what the run's task measures; default: what the columns say.

    Raises:
        CheckpointError: the file is missing, or a line of it is not a row of results.
    """
    rows: list[EpochRow] = []
    try:
        table = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    except OSError as error:
        raise CheckpointError(f"cannot read results from {path}: {error.strerror}") from None
    except Malformed as error:
        raise CheckpointError(f"{path} is damaged: {error}; delete it") from None
    try:
        for cells in table:
            rows.append(_row_of(cells, tuple(measures or _measures_in(cells))))
            if len(rows) > 1:
                _require_order(*rows[-2:])
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        where = f"{path} line {table.line_num} is not a row of results"
        reason = f" ({error})" if isinstance(error, Malformed) else ""
        raise CheckpointError(f"{where}{reason}; correct or delete the line") from None
    return rows


def _row_of(cells: Mapping[str, str], measures: tuple[Measure, ...]) -> EpochRow:
    modules = range(1, sum(str(name).startswith("train_loss_") for name in cells) + 1)
    if not modules or None in cells:
        raise ValueError("it has cells without a column, or no losses")
    headline, *others = measures
    heads = [_score(cells, f"test_{headline.short}_{k}", headline) for k in modules]
    (speed,) = [name for name in cells if name.endswith("s_per_second")]
    row = EpochRow(
        epoch=int(cells["epoch"]),
        step=int(cells["step"]),
        lr=float(cells["lr"]),
        train_losses=tuple(float(cells[f"train_loss_{k}"]) for k in modules),
        heads=tuple(heads),
        network=(heads[-1], *(_score(cells, f"test_{measure.short}", measure) for measure in others)),
        examples_per_second=float(cells[speed]),
        predicted_memory=_optional(cells["predicted_memory"]),
        peak_memory=_optional(cells["peak_memory"]),
        seconds=float(cells["seconds"]),
        measures=measures,
        unit=speed.removesuffix("s_per_second"),
    )
    check({name: getattr(row, name) for name in _ROW} | {"train_losses": list(row.train_losses)}, _ROW)
    return row


def _measures_in(cells: Mapping[str, str]) -> list[Measure]:
    """The measures whose columns there are; those of a classification are known."""
    known = {measure.short: measure for measure in ACCURACIES}
    names = [name.removeprefix("test_") for name in cells if name and name.startswith("test_")]
    shorts = dict.fromkeys(re.sub(r"_\d+$", "", name) for name in names)
    return [known.get(short, Measure(short, short)) for short in shorts]


def _score(cells: Mapping[str, str], column: str, measure: Measure) -> float | None:
    value = float(cells[column]) if cells[column] else None
    check({column: value}, {column: (PERCENT if measure.percent else LOSS, NULL)})
    return value


def _require_order(before: EpochRow, row: EpochRow) -> None:
    if row.epoch <= before.epoch or len(row.train_losses) != len(before.train_losses):
        raise Malformed(f"epoch {row.epoch} after epoch {before.epoch}")


def _optional(cell: str) -> int | None:
    return int(cell) if cell else None
