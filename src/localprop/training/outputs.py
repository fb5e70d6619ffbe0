"""What training writes into the run folder beside checkpoints: results, losses, curves and weights."""

import time
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from localprop.errors import CheckpointError
from localprop.models.lora import merged_weights
from localprop.report.curves import draw_curves
from localprop.report.losses import LossCurve
from localprop.report.measures import Measure
from localprop.report.results import EpochRow, read_results, write_results
from localprop.system.lock import FolderLock
from localprop.training.checkpoints.format import save_weights

CHECKPOINTS = "checkpoints"
RESULTS = "results.csv"
LOSSES = "losses.csv"
CURVES = "curves.png"
WEIGHTS = "model.safetensors"
_REDRAW_SECONDS = 30  # drawing the curves takes as long as a short epoch


class Outputs:
    """The files of a run folder, written by the process that reports.

    Args:
        folder: the run folder.
        title: heading of the curves.
        evaluated_on: "test" or "validation" images.
        modules: number of local modules.
        steps: steps of the whole run.
        steps_per_epoch: steps of an epoch.
        lock: on the run folder, in the process that writes into it.
        measures: what the task measures; default: what the file's columns say.

    Attributes:
        rows: a row per epoch.
        curve: losses in between.
    """

    def __init__(
        self,
        folder: Path,
        title: str,
        evaluated_on: str,
        modules: int,
        steps: int,
        steps_per_epoch: int,
        lock: FolderLock | None = None,
        measures: Sequence[Measure] | None = None,
    ) -> None:
        self.folder, self.lock, self._measures = folder, lock, measures
        self.rows: list[EpochRow] = []
        self.curve = LossCurve(steps, modules)
        self._title, self._evaluated_on, self._steps_per_epoch = title, evaluated_on, steps_per_epoch
        self._drawn = time.monotonic()
        self._weights_step = 0  # of the weights in the folder

    def read(self, epoch: int, step: int, ends: bool) -> None:
        """Reads the rows of a run that is resumed.

        Args:
            epoch: epochs completed.
            step: steps completed.
            ends: whether the run ends there: a row of an epoch that `--steps` cut short stays only then.

        Raises:
            CheckpointError: the file is damaged, or of another number of modules.
        """
        results = self.folder / RESULTS
        if not results.exists():
            return
        rows = read_results(results, self._measures)
        self._weights_step = rows[-1].step if rows else 0
        self.rows = [row for row in rows if row.epoch <= epoch or (ends and row.step == step)]
        if self.rows and len(self.rows[0].train_losses) != self.curve.modules:
            raise CheckpointError(
                f"{results} has not the losses of {self.curve.modules} modules; restore it, or delete it"
            )

    def require_folder(self) -> None:
        """Checks that nobody has removed the run folder: what is written now would be found by nobody."""
        if self.lock:
            self.lock.require()

    def add_step(self, step: int, losses: list[float], seconds: float, processor: float) -> None:
        """Takes in a training step; arguments as of `LossCurve.add`."""
        if self.curve.add(step, losses, seconds, processor):
            self.require_folder()
            self.curve.write(self.folder / LOSSES, step)

    def add_epoch(self, row: EpochRow, last: bool) -> None:
        """Writes what an epoch came to; `last` tells whether the run ends there."""
        self.rows.append(row)
        self.require_folder()
        write_results(self.folder / RESULTS, self.rows)
        if not last and time.monotonic() - self._drawn > _REDRAW_SECONDS:
            self._draw()

    def finish_curves(self, step: int) -> None:
        """Writes losses and curves once more, when the run ends after `step`."""
        self.require_folder()
        self.curve.write(self.folder / LOSSES, step)
        self._draw()

    def write_weights(self, weights: dict[str, Tensor], adapted: nn.Module | None = None) -> None:
        """Writes a state dict of the backbone, which is `adapted` where it has adapters: they are merged into it."""
        save_weights(self.folder / WEIGHTS, merged_weights(adapted, weights) if adapted else weights)

    def remove_old_weights(self, step: int) -> None:
        """Removes weights that are of an earlier step than the checkpoint of `step` that has been saved.

        Where a run is resumed that `--steps` had stopped, they would be taken for the run's.
        """
        if step > self._weights_step:
            (self.folder / WEIGHTS).unlink(missing_ok=True)

    def _draw(self) -> None:
        draw_curves(self.folder / CURVES, self.rows, self._title, self._evaluated_on, self._steps_per_epoch)
        self._drawn = time.monotonic()
