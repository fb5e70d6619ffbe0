"""The training loop: epochs, evaluation, checkpoints, results. It receives a built network and knows no method."""

import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from localprop.data.base import Data
from localprop.errors import CheckpointError, ConfigError, first_line, listing
from localprop.memory.measure import is_out_of_memory
from localprop.network.carry import Carry
from localprop.report.curves import draw_curves
from localprop.report.losses import LossCurve
from localprop.report.progress import Progress
from localprop.report.results import EpochRow, read_results, write_results
from localprop.seeding import derive_seed
from localprop.settings.config import TrainConfig
from localprop.system.files import refuse_link, remove_leftovers
from localprop.system.launched import stops_cleanly
from localprop.system.lock import FolderLock
from localprop.system.reading import AMOUNT, COUNT, LOSS, NULL, TEXT, Malformed, check
from localprop.training.checkpoint import Checkpoint, checkpoint_names, newest_checkpoint, save_weights
from localprop.training.gauge import Gauge
from localprop.training.scores import Scores, Tally, count_hits
from localprop.training.stage import Stage
from localprop.training.state import TrainingState, part_name

CHECKPOINTS = "checkpoints"
RESULTS = "results.csv"
LOSSES = "losses.csv"
CURVES = "curves.png"
WEIGHTS = "model.safetensors"
_POSITION = {
    "epoch": COUNT,
    "batch": COUNT,
    "seconds": AMOUNT,
    "epoch_seconds": AMOUNT,
    "loss_sums": [LOSS],
    "peak": (COUNT, NULL),
    "layout": TEXT,
}
_REDRAW_SECONDS = 30  # drawing the curves takes as long as a short epoch


class Interrupted(Exception):
    """A signal asked the run to stop; a checkpoint has been saved."""

    def __init__(self, number: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; everything is in {checkpoint}")
        self.exit_code = 128 + number


@dataclass
class Position:
    """Where a run stands; saved with each checkpoint."""

    epoch: int = 0
    """Epochs completed."""
    batch: int = 0
    """Batches completed of the epoch under way."""
    seconds: float = 0.0
    """Wall clock so far, summed over resumes."""
    epoch_seconds: float = 0.0
    """Seconds spent on training batches of the epoch under way."""
    loss_sums: list[float] = field(default_factory=list)
    """Sum of each module's losses over those batches."""
    peak: int | None = None
    """Measured peak memory of a step in bytes."""
    layout: str = ""
    """Of the processes that measured it."""


class Trainer:
    """Trains a network on a dataset inside a run folder.

    Args:
        state: the network, on its device already, and its optimizers.
        data: what to train and evaluate on.
        config: the run's settings.
        folder: the run folder.
        device: where the network is.
        title: heading of the curves.
        predicted: predicted peak memory of a step in bytes; None if there is no prediction.
        stage: which modules are trained in this process, and how it goes on with the others; default: all.
        lock: on the run folder, in a process that writes into it.

    Attributes:
        wants_test: whether to evaluate the `Data.final` test images after training, where there are any.
        tested: what they came to, in the process that reports; None before.
        last_step: the step after which training ends: the last of the last epoch, or that of `--steps`.
        gauge: measures memory. A run that is resumed in the same layout knows what was measured before.
    """

    def __init__(
        self,
        state: TrainingState,
        data: Data,
        config: TrainConfig,
        folder: Path,
        device: torch.device,
        title: str,
        predicted: int | None = None,
        stage: Stage | None = None,
        lock: FolderLock | None = None,
    ) -> None:
        self.lock = lock
        self.state, self.data, self.config, self.folder, self.device = state, data, config, folder, device
        self.predicted = predicted
        self.net = state.net
        self.stage = stage or Stage(state.modules)
        self.gauge = Gauge(state, self.stage, device, config.optim.micro_batches, data)
        self.title = title
        self.steps_per_epoch = data.steps_per_epoch(config.optim.batch_size)
        self.position = Position(loss_sums=[0.0] * len(self.net.local_modules), layout=self.stage.name)
        self.rows: list[EpochRow] = []
        steps = self.steps_per_epoch * config.optim.epochs
        self.last_step = min(steps, config.run.steps or steps)
        self.curve = LossCurve(steps, len(self.net.local_modules))
        self.wants_test = True
        self.tested: Scores | None = None
        self._signal = 0
        self._skipped_noted = 0
        self._drawn = time.monotonic()
        self._finished = 0  # the step of which the folder has the weights of a run's end

    def resume(self) -> list[str]:
        """Goes back to the newest valid checkpoint of the run folder.

        Returns:
            Lines for the user: which checkpoint was taken, and which were passed over and why.

        Raises:
            CheckpointError: there is none, or it does not fit.
            ConfigError: it is of a step after `--steps`.
        """
        refuse_link(self.folder / CHECKPOINTS)  # now, not hours later when the first one is saved
        if self.stage.reports:
            remove_leftovers(self.folder)
        own = [part_name(k) for k in self.stage.modules]
        place = self.folder / CHECKPOINTS
        checkpoint, notes = newest_checkpoint(
            place,
            only=own,
            flaw=self.state.flaw,
            accept=self._accept,
            agree=self.stage.agree,
            names=self.stage.shared(checkpoint_names(place)),
        )
        if checkpoint is None:
            reasons = f" ({listing(notes)})" if notes else ""
            raise CheckpointError(f"{self.folder} has no valid checkpoint{reasons}; start a new run")
        if self.state.step > self.last_step:
            raise ConfigError(
                f"--steps is {self.last_step}, but {self.folder} is at step {self.state.step} already; choose more "
                "--steps, or leave them out"
            )
        if self.position.layout != self.stage.name:
            self.position.layout, self.position.peak = self.stage.name, None
        self.gauge.peak = self.position.peak
        results = self.folder / RESULTS
        if results.exists():
            rows = read_results(results)
            self._finished = rows[-1].step if rows else 0
            # A row of an epoch that --steps cut short stays only where the run still ends there.
            here = self.state.step if self.state.step == self.last_step else None
            self.rows = [row for row in rows if row.epoch <= self.position.epoch or row.step == here]
            count = len(self.net.local_modules)
            if self.rows and len(self.rows[0].train_losses) != count:
                raise CheckpointError(f"{results} has not the losses of {count} modules; restore it, or delete it")
        where = f"epoch {self.position.epoch + 1}, batch {self.position.batch + 1}"
        return [*notes, f"resumed from {checkpoint.path}, at {where}"]

    def _accept(self, checkpoint: Checkpoint) -> str | None:
        """Takes a checkpoint over; says what is wrong with it where it cannot be."""
        try:
            self.position = self._position(checkpoint)
            self.curve = LossCurve(self.curve.steps, self.curve.modules)  # without what a bad checkpoint has left
            if "curve" in checkpoint.meta:
                self.curve.load(checkpoint.meta["curve"])
            self.state.load(checkpoint.parts, checkpoint.step)
        except (Malformed, CheckpointError) as error:
            return str(error)
        return None

    def _position(self, checkpoint: Checkpoint) -> Position:
        """Where the run stood; raises a Malformed where it cannot have stood there."""
        check(checkpoint.meta, {"position": _POSITION})
        saved = checkpoint.meta["position"]
        if unknown := saved.keys() - _POSITION.keys():
            raise Malformed(f"position has {str(min(unknown, key=str))[:40]!r}, which is unknown")
        position, steps = Position(**saved), self.steps_per_epoch
        if len(position.loss_sums) != len(self.net.local_modules):
            raise Malformed(f"position.loss_sums has {len(position.loss_sums)} entries")
        ends = position.epoch + (position.batch > 0) > self.config.optim.epochs
        # A signal may come behind the last batch of an epoch, which is not finished then.
        if ends or position.batch > steps or checkpoint.step != position.epoch * steps + position.batch:
            raise Malformed(f"epoch {position.epoch}, batch {position.batch} is not step {checkpoint.step} of this run")
        if checkpoint.step and not position.epoch_seconds:
            raise Malformed("position.epoch_seconds is 0 after steps")
        return position

    def run(self, progress: Progress) -> list[EpochRow]:
        """Trains to `last_step`, and writes results, curves and weights into the run folder.

        Raises:
            Interrupted: SIGTERM or SIGINT came; a checkpoint of the step under way has been saved.
            MemoryError: there is not enough.
            NonFiniteLossError, DataError, CheckpointError: see there. Checkpoints written before stay.
        """
        with self._signals(), _out_of_memory_told():
            at_an_end = self.position.batch == 0 or self.state.step == self.last_step
            if self.state.step and at_an_end and (not self.rows or self.rows[-1].step < self.state.step):
                self._finish_epoch(progress)  # stopped between the checkpoint and the evaluation
            while self.state.step < self.last_step:
                self._train_epoch(progress)
                self._finish_epoch(progress)
            # Of a finished run that is resumed nothing is left to do but this.
            weights = self.stage.weights(self.state)
            if self.stage.reports:
                self._require_folder()
                self.curve.write(self.folder / LOSSES, self.state.step)
                self._draw()
                self.state.require_finite(weights)
                save_weights(self.folder / WEIGHTS, weights)
            if self.wants_test and self.data.final:
                self.tested = self.evaluate(self.data.final)
        return self.rows

    def evaluate(self, data: Data | None = None) -> Scores | None:
        """Evaluates every module's head and the network (or its moving average).

        Args:
            data: whose test images are taken; default: those trained with.

        Returns:
            What was found; None in a process that does not report.
        """
        averaged = self.state.ema.module.eval() if self.state.ema else None
        tally = Tally()
        self.net.eval()
        at_once = self.config.optim.batch_size // self.config.optim.micro_batches // self.stage.replicas
        batches = self.stage.test_batches(data or self.data, at_once, self.device, 1 if averaged is None else 2)
        # Compiled code would be compiled again for evaluation, and once more for its last, smaller batch.
        with torch.compiler.set_stance("force_eager") if self.config.run.compile else nullcontext(), torch.no_grad():
            for carries in batches:
                for carry, model in zip(carries, (None, averaged), strict=False):
                    self._classify(carry, model)
                    self.stage.send(carry, self._signal)
                if self.stage.reports:
                    final = carries[-1]
                    hits = [*carries[0].hits[:-1], count_hits(final.features, final.labels)]
                    tally.add(hits, final.features, final.labels)
                self._stop_if_asked(carries[-1].stop)
        self.net.train()
        return tally.scores() if self.stage.reports else None

    def _classify(self, carry: Carry, averaged: nn.Module | None) -> None:
        """Runs the modules trained here and their heads, or, without heads, those of a moving average."""
        with self._autocast():
            for k in self.stage.modules:
                module = self.net.local_modules[k]
                if averaged is None:
                    carry.features = module(carry.features, carry.context)
                    carry.hits.append(count_hits(module.auxiliary.classify(carry.features), carry.labels))
                else:
                    carry.features = module.run_on(averaged, carry.features, carry.context)

    def _train_epoch(self, progress: Progress) -> None:
        position, optim = self.position, self.config.optim
        every = self.config.run.checkpoint_steps
        sizes = optim.batch_size, optim.micro_batches
        if position.batch == 0:  # a checkpoint of the end of an epoch still has what belongs to that
            position.loss_sums = [0.0] * len(self.net.local_modules)
            position.epoch_seconds = 0.0
        steps = range(position.batch, min(self.steps_per_epoch, position.batch + self.last_step - self.state.step))
        self.net.train()
        self._start_clock()
        batches = self.stage.train_batches(self.data, position.epoch, *sizes, self.device, steps)
        for _ in steps:
            losses, stop = self._step(islice(batches, optim.micro_batches))
            position.batch += 1
            self._note_skipped(progress)
            if self.stage.reports:
                self._record(losses.tolist(), progress)
            if every and self.state.step % every == 0 and position.batch < steps.stop:
                self._save()
            self._stop_if_asked(stop)
        if position.batch < self.steps_per_epoch:
            self._save()  # --steps ends here

    def _record(self, losses: list[float], progress: Progress) -> None:
        """Takes down the losses of a step that has been done."""
        position = self.position
        position.loss_sums = [total + loss for total, loss in zip(position.loss_sums, losses, strict=True)]
        if self.curve.add(self.state.step, losses, *self._advance_clock(training=True)):
            self._require_folder()
            self.curve.write(self.folder / LOSSES, self.state.step)
        progress.step(position.epoch + 1, position.batch, losses, self.gauge.peak or self.predicted or 0)

    def _step(self, parts: Iterator[Carry]) -> tuple[Tensor, int]:
        """One training step.

        Args:
            parts: its micro-batches, as they come.

        Returns:
            (K,) mean losses, of the modules that are known here, and the last micro-batch's `Carry.stop`.
        """
        losses = []
        for part, carry in enumerate(parts):
            self._train(carry, part)
            self.stage.send(carry, self._signal)
            losses.append(torch.stack([loss.float() for loss in carry.losses]))
        return torch.stack(losses).mean(0), carry.stop

    def _train(self, carry: Carry, part: int) -> None:
        """Trains on a micro-batch."""
        count = self.config.optim.micro_batches
        # Replicas drop other things than each other, and so do micro-batches; the first as if there were no others.
        place = (self.state.step, self.stage.replica, part)
        seed = derive_seed(self.config.run.seed, "step", *place[: 3 if part else 2 if self.stage.replica else 1])
        with self.gauge.on(carry, part) as own, self._autocast():
            self.state.train_step(own, seed, last=part + 1 == count)

    def _finish_epoch(self, progress: Progress) -> None:
        position = self.position
        if position.batch == self.steps_per_epoch:
            position.epoch, position.batch = position.epoch + 1, 0
            self._save()  # before the evaluation, which may fail
        self._start_clock()
        self.gauge.peak = self.stage.highest(self.gauge.peak)
        due = position.epoch % self.config.run.val_interval == 0 or self.state.step == self.last_step
        scores = self.evaluate() if due else None
        self._advance_clock(training=False)
        if self.stage.reports:
            self._report(scores, progress)

    def _report(self, scores: Scores | None, progress: Progress) -> None:
        """Writes and shows what an epoch came to."""
        position = self.position
        steps = position.batch or self.steps_per_epoch
        images = steps * self.config.optim.batch_size
        row = EpochRow(
            epoch=position.epoch + (position.batch > 0),
            step=self.state.step,
            lr=self.state.lr,
            train_losses=tuple(total / steps for total in position.loss_sums),
            test_accuracies=scores.top1 if scores else (None,) * len(position.loss_sums),
            test_top5=scores.top5 if scores else None,
            test_loss=scores.loss if scores else None,
            images_per_second=images / position.epoch_seconds,
            predicted_memory=self.predicted,
            peak_memory=self.gauge.peak,
            seconds=position.seconds,
        )
        self.rows.append(row)
        self._require_folder()
        write_results(self.folder / RESULTS, self.rows)
        # At the end of training they are drawn once more.
        if time.monotonic() - self._drawn > _REDRAW_SECONDS and self.state.step < self.last_step:
            self._draw()
        progress.epoch(row)

    def _draw(self) -> None:
        draw_curves(self.folder / CURVES, self.rows, self.title, self.data.evaluated_on, self.steps_per_epoch)
        self._drawn = time.monotonic()

    def _require_folder(self) -> None:
        """Checks that nobody has removed the run folder: what is written now would be found by nobody."""
        if self.lock:
            self.lock.require()

    def _save(self) -> Path:
        self._require_folder()
        self.position.peak = self.gauge.peak
        meta = {"position": vars(self.position), "curve": self.curve.state()}
        run = self.config.run
        folder = self.folder / CHECKPOINTS
        path = self.stage.save(folder, self.state.step, self.state.parts(), meta, run.checkpoint_hist)
        if self.stage.reports and self.state.step > self._finished:
            # Weights of an earlier --steps would be taken for those of the run.
            (self.folder / WEIGHTS).unlink(missing_ok=True)
        return path

    def _start_clock(self) -> None:
        self._clock, self._processor_clock = time.perf_counter(), time.process_time()

    def _advance_clock(self, training: bool) -> tuple[float, float]:
        """Takes down the time since it was called last; gives it in seconds, on the clock and of the processor."""
        before = self._clock, self._processor_clock
        self._start_clock()
        passed, busy = self._clock - before[0], self._processor_clock - before[1]
        self.position.seconds += passed
        if training:
            self.position.epoch_seconds += passed
        return passed, busy

    def _autocast(self) -> AbstractContextManager[Any]:
        optim = self.config.optim
        if not optim.amp:
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, optim.amp_dtype))

    def _note_skipped(self, progress: Progress) -> None:
        for path in self.data.skipped[self._skipped_noted :]:
            progress.note(f"skipped an unreadable training image: {listing([path])}")
        self._skipped_noted = len(self.data.skipped)

    def _stop_if_asked(self, stop: int) -> None:
        if number := self.stage.stopping(stop, self._signal):
            raise Interrupted(number, self._save())

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Lets SIGTERM and SIGINT end the run after the step under way, with a checkpoint."""

        def remember(number: int, frame: Any) -> None:
            self._signal = number
            signal.signal(number, before[signal.Signals(number)])  # a second one ends a run that hangs

        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in before:
            signal.signal(number, remember)
        try:
            with stops_cleanly():
                yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _out_of_memory_told() -> Iterator[None]:
    """Turns what allocators raise into a MemoryError."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise MemoryError(first_line(error)) from error
        raise
