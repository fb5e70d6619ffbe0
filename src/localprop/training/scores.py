"""What an evaluation finds: the scores of every module's head and of the network."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from localprop.tasks.base import Batch, Task


@dataclass(frozen=True)
class Scores:
    """What an evaluation found.

    Attributes:
        task: what was evaluated.
        heads: the headline of each module's head, None where it has none; the last is the network's.
        network: the network's score of each of the task's measures.
        examples: number of examples.
    """

    task: Task
    heads: tuple[float | None, ...]
    network: tuple[float | None, ...]
    examples: int

    def among(self, modules: int) -> "Scores":
        """The same for so many modules, where in a finish those before the last have no heads any more."""
        return replace(self, heads=(None,) * (modules - len(self.heads)) + self.heads)

    def record(self) -> dict[str, Any]:
        """The same for a JSON file, by the names of the measures."""
        names = [measure.name for measure in self.task.measures]
        modules = "module_accuracies" if names[0] == "accuracy" else "module_scores"
        examples = {f"{self.task.unit}s": self.examples}
        return {**examples, **dict(zip(names, self.network, strict=True)), modules: list(self.heads)}


@dataclass
class Tally:
    """Adds up a task's sums, batch by batch."""

    task: Task
    sums: list[Tensor | None] = field(default_factory=list)
    examples: int = 0

    def add(self, sums: Sequence[Tensor | None], examples: int) -> None:
        """Takes in a batch: the sums of every module's head, the network's last, and the number of examples."""
        sums = [None if own is None else own.cpu() for own in sums]
        before = self.sums or [None if own is None else torch.zeros_like(own) for own in sums]
        self.sums = [None if a is None or b is None else a + b for a, b in zip(before, sums, strict=True)]
        self.examples += examples

    def scores(self) -> Scores:
        """What was found in all."""
        found = [None if own is None else list(map(_known, self.task.scores(own))) for own in self.sums]
        network = found[-1]
        assert network is not None  # the last module predicts
        heads = tuple(None if own is None else own[0] for own in found)
        return Scores(self.task, heads, tuple(network), self.examples)


def _known(score: float | None) -> float | None:
    """A score; None for NaN, which says the same, and which JSON has no number for."""
    return None if score is None or math.isnan(score) else score


def sums_of(task: Task, prediction: Tensor | None, targets: Tensor) -> Tensor | None:
    """The task's sums of a prediction; None without one."""
    return None if prediction is None else task.sums(prediction, targets)


@torch.no_grad()
def evaluate(task: Task, predict: Callable[[Tensor], Tensor], batches: Iterable[Batch]) -> Scores:
    """Evaluates a model.

    Args:
        task: what it is trained for.
        predict: gives for a batch of inputs its prediction.
        batches: [inputs, targets], as the task prepares them.
    """
    tally = Tally(task)
    for inputs, targets in batches:
        tally.add([task.sums(predict(inputs), targets)], len(targets))
    return tally.scores()
