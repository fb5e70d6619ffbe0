"""losses.csv: the training loss of every module and the time per step, at about a hundred moments of a run."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from localprop.errors import CheckpointError
from localprop.system.files import written_aside
from localprop.system.reading import AMOUNT, COUNT, LOSS, Malformed, check, read_text

MOMENTS = 100
COLUMNS = ("step", "seconds_per_step", "processor_seconds_per_step")  # before a column for each module
_STATE = {"rows": [[LOSS]], "count": COUNT, "seconds": AMOUNT, "processor": AMOUNT, "sums": [LOSS]}


@dataclass
class LossCurve:
    """Mean losses and time per step since the moment before. What it holds is saved with each checkpoint.

    Args:
        steps: steps of the whole run, whether or not it is stopped before: moments lie at the same steps then.
        modules: number of local modules.

    Attributes:
        rows: (step, seconds per step, processor seconds per step, loss of each module), one per moment.
    """

    steps: int
    modules: int
    rows: list[list[float]] = field(default_factory=list)
    count: int = 0
    seconds: float = 0.0
    processor: float = 0.0
    sums: list[float] = field(default_factory=list)

    def add(self, step: int, losses: Sequence[float], seconds: float, processor: float) -> bool:
        """Takes in the losses of `step` (from 1) and the time it took; tells whether that made a row.

        Args:
            step: the step, from 1.
            losses: of each module.
            seconds: on the clock.
            processor: seconds of processor time, of all threads together: what other programs hardly disturb.
        """
        before = self.sums or [0.0] * self.modules
        self.sums = [total + loss for total, loss in zip(before, losses, strict=True)]
        self.count, self.seconds, self.processor = self.count + 1, self.seconds + seconds, self.processor + processor
        # So that moments lie at the same steps whatever was interrupted, and the last step is one.
        if step * MOMENTS // self.steps == (step - 1) * MOMENTS // self.steps:
            return False
        self.rows.append(self._means(step))
        self.count, self.seconds, self.processor, self.sums = 0, 0.0, 0.0, []
        return True

    def _means(self, step: int) -> list[float]:
        """The row of a moment: means since the moment before."""
        return [step, *(total / self.count for total in (self.seconds, self.processor, *self.sums))]

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to keep."""
        return {name: getattr(self, name) for name in ("rows", "count", "seconds", "processor", "sums")}

    def load(self, state: dict[str, Any]) -> None:
        """Goes back to what `state` gave.

        Raises:
            Malformed: it is not what `state` gives.
        """
        check(state, _STATE, "curve")
        widths = {len(row) - len(COLUMNS) for row in state["rows"]} | ({len(state["sums"])} if state["sums"] else set())
        if widths - {self.modules}:
            raise Malformed(f"the curve has losses of another number of modules than {self.modules}")
        for name in _STATE:
            setattr(self, name, state[name])

    def write(self, path: Path, step: int) -> None:
        """Writes the rows to a CSV file, in place of what was there; floats so that reading gives the same bits.

        Args:
            path: the file.
            step: the last step; where it is no moment, because the run stops early, it gets a row in the file all the
                same.
        """
        rows = self.rows + ([self._means(step)] if self.count else [])
        with written_aside(path) as aside, aside.open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow([*COLUMNS, *(f"loss_{k}" for k in range(1, self.modules + 1))])
            table.writerows([int(row[0]), *row[1:]] for row in rows)


def read_losses(path: Path) -> list[list[float]]:
    """Reads the rows that `LossCurve.write` wrote.

    Raises:
        CheckpointError: the file is missing, or a line of it is not a row of numbers.
    """
    try:
        table = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except Malformed as error:
        raise CheckpointError(f"{path} is damaged: {error}; delete it") from None
    rows: list[list[float]] = []
    try:
        width = len(next(table, COLUMNS))
        for cells in table:
            rows.append([float(cell) for cell in cells])
            check(rows[-1][: len(COLUMNS)], [AMOUNT])
            if len(cells) != width or width <= len(COLUMNS) or rows[-1][0] <= (rows[-2][0] if len(rows) > 1 else 0):
                raise ValueError
    except (ValueError, csv.Error):
        raise CheckpointError(f"{path} line {table.line_num} is not a row of losses; delete the file") from None
    return rows
