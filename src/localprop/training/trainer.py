"""The training loop: epochs, evaluation, checkpoints, results. It receives a built network and knows no method."""

import gc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from localprop.data.base import Data
from localprop.errors import CheckpointError, ConfigError, listing
from localprop.memory.measure import one_memory_error
from localprop.network.carry import Carry
from localprop.report.losses import LossCurve
from localprop.report.progress import Progress
from localprop.report.results import EpochRow
from localprop.seeding import derive_seed
from localprop.settings.config import TrainConfig
from localprop.system.files import refuse_link, remove_leftovers
from localprop.system.launched import stops_cleanly
from localprop.system.lock import FolderLock
from localprop.system.reading import Malformed
from localprop.training.checkpoints.folder import checkpoint_names
from localprop.training.checkpoints.loading import Checkpoint, newest_checkpoint
from localprop.training.checkpoints.parts import part_name
from localprop.training.evaluating import evaluate_network
from localprop.training.gauge import Gauge
from localprop.training.outputs import CHECKPOINTS, Outputs
from localprop.training.position import Clock, Position, read_position
from localprop.training.records import StepRecords
from localprop.training.scores import Scores
from localprop.training.signals import Interrupted
from localprop.training.stage import Finish, Stage
from localprop.training.state import TrainingState, autocast
from localprop.training.stepping.captured import use_graphs


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
        stage: which modules are trained in this process, and what it shares with others; default: all.
        lock: on the run folder, in a process that writes into it.
        finish: what trains the last epochs instead of `state`, if something else does.

    Attributes:
        last_step: the step after which training ends: the last of the last epoch, or that of `--steps`.
        tests_at_end: whether to evaluate the `Data.final` test images after training, where there are any.
        tested: what they came to, in the process that reports; None before.
        gauge: measures memory. A run that is resumed in the same layout knows what was measured before.
        outputs: the files of the run folder.
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
        finish: Finish | None = None,
    ) -> None:
        self.state, self.data, self.config, self.folder, self.device = state, data, config, folder, device
        self.predicted, self.finish = predicted, finish
        self.stage = stage or Stage(state.modules)
        self.gauge = Gauge(state, self.stage, device, config.optim.micro_batches, data)
        self.steps_per_epoch = data.steps_per_epoch(config.optim.batch_size)
        count, steps = state.net.loss_count, self.steps_per_epoch * config.optim.epochs
        self.last_step = min(steps, config.run.steps or steps)
        self.position = Position(loss_sums=[0.0] * count, layout=self.stage.name)
        measures = state.net.task.measures
        self.outputs = Outputs(folder, title, data.evaluated_on, count, steps, self.steps_per_epoch, lock, measures)
        self.tests_at_end = True
        self.tested: Scores | None = None
        self._clock = Clock()
        self._records = StepRecords(state, self.stage.reports, self.outputs, self.gauge, self._clock, device, predicted)
        self._accepted = state
        self._skipped_noted = 0

    def resume(self) -> list[str]:
        """Goes back to the newest valid checkpoint of the run folder.

        Returns:
            Lines for the user: which checkpoint was taken, and which were passed over and why.

        Raises:
            CheckpointError: there is none, or it does not fit.
            ConfigError: it is of a step after `--steps`.
        """
        place = self.folder / CHECKPOINTS
        refuse_link(place)  # now, not hours later when the first one is saved
        if self.stage.reports:
            remove_leftovers(self.folder)
        checkpoint, notes = newest_checkpoint(
            place,
            only=[part_name(k) for k in self.stage.modules],
            flaw=self.state.flaw,
            accept=self._accept,
            agree=self.stage.agree,
            # Another process may not see the same files yet.
            names=self.stage.from_reporter(checkpoint_names(place)),
        )
        if checkpoint is None:
            reasons = f" ({listing(notes)})" if notes else ""
            raise CheckpointError(f"{self.folder} has no valid checkpoint{reasons}; start a new run")
        self._follow(self._accepted)
        if self.state.step > self.last_step:
            raise ConfigError(
                f"--steps is {self.last_step}, but {self.folder} is at step {self.state.step} already; choose more "
                "--steps, or leave them out"
            )
        if self.position.layout != self.stage.name:
            self.position.layout, self.position.peak = self.stage.name, None
        self.gauge.peak = self.position.peak
        self.outputs.read(self.position.epoch, self.state.step, self._at_end)
        where = f"epoch {self.position.epoch + 1}, batch {self.position.batch + 1}"
        return [*notes, f"resumed from {checkpoint.path}, at {where}"]

    def _accept(self, checkpoint: Checkpoint) -> str | None:
        """Takes a checkpoint over; says what is wrong with it where it cannot be."""
        count, epochs = self.outputs.curve.modules, self.config.optim.epochs
        curve = LossCurve(self.steps_per_epoch * epochs, count)  # without what a bad checkpoint has left
        try:
            self.position = read_position(checkpoint.meta, checkpoint.step, count, epochs, self.steps_per_epoch)
            if "curve" in checkpoint.meta:
                curve.load(checkpoint.meta["curve"])
            self.outputs.curve = curve
            # Built anew each time: what of it a checkpoint has changed that is not taken in the end must not stay.
            in_finish = self.finish and checkpoint.step > self.finish.first
            self._accepted = self.finish.build(self.state.ema) if self.finish and in_finish else self.state
            self._accepted.load(checkpoint.parts, checkpoint.step)
        except (Malformed, CheckpointError) as error:
            return str(error)
        return None

    def _follow(self, state: TrainingState) -> None:
        """Trains with this state from now on. If that is another one, what only that before it needs is free."""
        if state is not self.state:
            self.state, self.finish = state, None
            self.gauge.follow(state)
            self._records.follow(state)
            self._accepted = state
            gc.collect()  # or auxiliary nets and moments would wait for it, in circles of references
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    @property
    def _at_end(self) -> bool:
        return self.state.step == self.last_step

    def run(self, progress: Progress) -> list[EpochRow]:
        """Trains to `last_step`, and writes results, curves and weights into the run folder.

        Raises:
            Interrupted: SIGTERM or SIGINT came; a checkpoint of the step under way has been saved.
            MemoryError: there is not enough.
            NonFiniteLossError, DataError, CheckpointError: see there. Checkpoints written before stay.
        """
        self._records.progress = progress
        with self.stage.signals, stops_cleanly(), one_memory_error():
            if not self._at_end:
                self._use_graphs(progress)
            rows, epoch_ends = self.outputs.rows, self.position.batch == 0 or self._at_end
            if self.state.step and epoch_ends and (not rows or rows[-1].step < self.state.step):
                self._finish_epoch(progress)  # stopped between the checkpoint and the evaluation
            while not self._at_end:
                if self.finish and self.state.step == self.finish.first and self.position.batch == 0:
                    self._follow(self.finish.build(self.state.ema))
                    self._use_graphs(progress)
                self._train_epoch(progress)
                self._finish_epoch(progress)
            # Of a finished run that is resumed nothing is left to do but this.
            weights = self.stage.weights(self.state)
            if self.stage.reports:
                self.outputs.finish_curves(self.state.step)
                self.state.steps.finite.require(weights)
                self.outputs.write_weights(weights, self.state.evaluated if self.config.backbone.lora else None)
            if self.tests_at_end and self.data.final:
                self.tested = self.evaluate(self.data.final)
        return rows

    def evaluate(self, data: Data | None = None) -> Scores | None:
        """Evaluates every module's head and the network (or its moving average).

        Args:
            data: whose test images are taken; default: those trained with.

        Returns:
            What was found; None in a process that does not report.
        """
        data = data or self.data
        found = evaluate_network(self.state, self.stage, data, self.config, self.device, self._stop_if_asked)
        return found and found.among(self.outputs.curve.modules)

    def _use_graphs(self, progress: Progress) -> None:
        use_graphs(self.state, self.config.run, self.device, self.stage.replicas > 1, progress.note)

    def _train_epoch(self, progress: Progress) -> None:
        """Trains to the end of an epoch, or to `last_step` within it."""
        position, optim = self.position, self.config.optim
        every = self.config.run.checkpoint_steps
        if position.batch == 0:
            position.begin_epoch()
        steps = range(position.batch, min(self.steps_per_epoch, position.batch + self.last_step - self.state.step))
        self.state.net.train()
        self._clock.start()
        batches = self.stage.train_batches(
            self.data, position.epoch, optim.batch_size, optim.micro_batches, self.device, steps
        )
        for _ in steps:
            losses, stop = self._train_step(islice(batches, optim.micro_batches))
            position.batch += 1
            self._note_skipped(progress)
            self._records.add(position, losses)
            if every and self.state.step % every == 0 and position.batch < steps.stop:
                self._save()
            self._stop_if_asked(stop)
        if position.batch < self.steps_per_epoch:
            self._save()  # --steps ends here

    def _train_step(self, micro_batches: Iterator[Carry]) -> tuple[Tensor, int]:
        """One training step on micro-batches, as they come.

        Returns:
            (K,) mean losses, of the modules that are known here, and the last micro-batch's `Carry.stop`. In exact
            training (1,) that of the network.
        """
        losses = []
        for number, carry in enumerate(micro_batches):
            carry = self._train_micro_batch(carry, number)
            self.stage.send(carry)
            losses.append(torch.stack([loss.float() for loss in carry.losses]))
        return torch.stack(losses).mean(0), carry.stop

    def _train_micro_batch(self, carry: Carry, number: int) -> Carry:
        # Replicas drop other things than each other, and so do micro-batches; the first as if there were no others.
        place = [self.state.step]
        if number or self.stage.replica:
            place.append(self.stage.replica)
        if number:
            place.append(number)
        seed = derive_seed(self.config.run.seed, "step", *place)
        last = number + 1 == self.config.optim.micro_batches

        def train(own: Carry) -> None:
            with autocast(self.config.optim, self.device):
                self.state.train_step(own, seed, last)

        return self.gauge.watch(carry, number, train)

    def _finish_epoch(self, progress: Progress) -> None:
        position = self.position
        self._records.finish(position)
        if position.batch == self.steps_per_epoch:
            position.epoch, position.batch = position.epoch + 1, 0
            self._save()  # before the evaluation, which may fail
        self._clock.start()
        self.gauge.peak = self.stage.highest(self.gauge.peak)
        due = position.epoch % self.config.run.val_interval == 0 or self._at_end
        scores = self.evaluate() if due else None
        self._clock.lap(position, training=False)
        self.gauge.note_reserved()
        if self.stage.reports:
            row = self._records.row(position, scores, self.steps_per_epoch, self.config.optim.batch_size)
            self.outputs.add_epoch(row, last=self._at_end)
            progress.epoch(row)

    def _save(self) -> Path:
        self._records.finish(self.position)  # no state is saved before it is known to be finite
        self.outputs.require_folder()
        self.position.peak = self.gauge.peak
        meta = {"position": vars(self.position), "curve": self.outputs.curve.state()}
        keep = self.config.run.checkpoint_hist
        path = self.stage.save(self.folder / CHECKPOINTS, self.state.step, self.state.parts(), meta, keep)
        if self.stage.reports:
            self.outputs.remove_old_weights(self.state.step)
        return path

    def _note_skipped(self, progress: Progress) -> None:
        for path in self.data.skipped[self._skipped_noted :]:
            progress.note(f"skipped an unreadable training image: {listing([path])}")
        self._skipped_noted = len(self.data.skipped)

    def _stop_if_asked(self, stop: int) -> None:
        if number := self.stage.stop_after(stop):
            raise Interrupted(number, self._save())
