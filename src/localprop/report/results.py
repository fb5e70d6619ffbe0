"""results.csv: a row per epoch."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from localprop.errors import CheckpointError
from localprop.system.files import written_aside
from localprop.system.reading import AMOUNT, COUNT, LOSS, NULL, PERCENT, POSITIVE, Malformed, check, read_text

COLUMNS_BEFORE = ("epoch", "step", "lr")
COLUMNS_AFTER = ("test_top5", "test_loss", "images_per_second", "predicted_memory", "peak_memory", "seconds")
_ROW = {
    "epoch": POSITIVE,
    "step": POSITIVE,
    "lr": AMOUNT,
    "train_losses": [LOSS],
    "test_accuracies": [(PERCENT, NULL)],
    "test_top5": (PERCENT, NULL),
    "test_loss": (LOSS, NULL),
    "images_per_second": AMOUNT,
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
        test_accuracies: top-1 accuracy in percent of each module's head, the last being the network's own;
            None where a module has no head, and everywhere after an epoch without evaluation.
        test_top5: top-5 accuracy of the network in percent; None where it has no meaning.
        test_loss: mean cross-entropy of the network; None without evaluation.
        images_per_second: training throughput over the epoch.
        predicted_memory: peak memory of a training step in bytes, as predicted; None where that could not be.
        peak_memory: the same, as measured; None before it has been.
        seconds: wall clock since the run began, summed over resumes.
    """

    epoch: int
    step: int
    lr: float
    train_losses: tuple[float, ...]
    test_accuracies: tuple[float | None, ...]
    test_top5: float | None
    test_loss: float | None
    images_per_second: float
    predicted_memory: int | None
    peak_memory: int | None
    seconds: float

    @property
    def accuracy(self) -> float:
        """The network's own top-1 accuracy in percent; NaN without evaluation."""
        last = self.test_accuracies[-1]
        return math.nan if last is None else last


def write_results(path: Path, rows: Sequence[EpochRow]) -> None:
    """Writes one or more `rows` to a CSV file, in place of what was there.

    Floats are written so that reading gives the same bits; None is an empty cell.
    """
    modules = range(1, len(rows[0].train_losses) + 1)
    columns = [f"train_loss_{k}" for k in modules] + [f"test_acc_{k}" for k in modules]
    with written_aside(path) as aside, aside.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow([*COLUMNS_BEFORE, *columns, *COLUMNS_AFTER])
        for row in rows:
            before, after = ([getattr(row, name) for name in names] for names in (COLUMNS_BEFORE, COLUMNS_AFTER))
            table.writerow([*before, *row.train_losses, *row.test_accuracies, *after])


def read_results(path: Path) -> list[EpochRow]:
    """Reads what `write_results` wrote.

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
            rows.append(_row_of(cells))
            if len(rows) > 1:
                _require_order(*rows[-2:])
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        where = f"{path} line {table.line_num} is not a row of results"
        reason = f" ({error})" if isinstance(error, Malformed) else ""
        raise CheckpointError(f"{where}{reason}; correct or delete the line") from None
    return rows


def _row_of(cells: Mapping[str, str]) -> EpochRow:
    modules = range(1, sum(str(name).startswith("train_loss_") for name in cells) + 1)
    if not modules or None in cells:
        raise ValueError("it has cells without a column, or no losses")
    accuracies = [cells[f"test_acc_{k}"] for k in modules]
    row = EpochRow(
        epoch=int(cells["epoch"]),
        step=int(cells["step"]),
        lr=float(cells["lr"]),
        train_losses=tuple(float(cells[f"train_loss_{k}"]) for k in modules),
        test_accuracies=tuple(float(cell) if cell else None for cell in accuracies),
        test_top5=float(cells["test_top5"]) if cells["test_top5"] else None,
        test_loss=float(cells["test_loss"]) if cells["test_loss"] else None,
        images_per_second=float(cells["images_per_second"]),
        predicted_memory=_optional(cells["predicted_memory"]),
        peak_memory=_optional(cells["peak_memory"]),
        seconds=float(cells["seconds"]),
    )
    losses, own = list(row.train_losses), list(row.test_accuracies)
    check({**vars(row), "train_losses": losses, "test_accuracies": own}, _ROW)
    return row


def _require_order(before: EpochRow, row: EpochRow) -> None:
    if row.epoch <= before.epoch or len(row.train_losses) != len(before.train_losses):
        raise Malformed(f"epoch {row.epoch} after epoch {before.epoch}")


def _optional(cell: str) -> int | None:
    return int(cell) if cell else None
