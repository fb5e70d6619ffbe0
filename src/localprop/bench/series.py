"""A series of a suite: runs that differ in their seed alone, and what they come to together."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from localprop.bench.record import Record
from localprop.report.measures import Measure

BASELINE = "end-to-end"
"""The method whose training with one module is what others are compared with."""


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (None of a single value) of `count` values."""

    mean: float
    std: float | None
    count: int

    def text(self, sign: str = "", percent: bool = True) -> str:
        """Mean and deviation, "80.12 ± 0.34"; with `sign` "+" the mean always has a sign.

        Args:
            sign: "" or "+".
            percent: whether they are percentages, of two digits after the point; others have four digits in all.
        """
        form = ".2f" if percent else ".4g"
        return f"{self.mean:{sign}{form}}" + ("" if self.std is None else f" ± {self.std:{form}}")


@dataclass(frozen=True)
class Series:
    """Runs that differ in their seed alone.

    Attributes:
        label: the method and what else tells the setting from the others of its task.
        short: the same without the method but for end-to-end training; with K where there are several modules.
        config: the settings, without the seed and without what changes nothing.
        records: one per seed.
    """

    label: str
    short: str
    config: dict[str, Any]
    records: dict[Any, Record]

    @property
    def measure(self) -> Measure:
        """What the headline of its task measures."""
        return next(iter(self.records.values())).measure

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.config["method"])

    @property
    def undivided(self) -> bool:
        """Whether this is end-to-end training of one module, with which others are compared."""
        return self.method == BASELINE and self.modules == 1

    @property
    def modules(self) -> int:
        """K."""
        return int(self.config["modules"])

    @cached_property
    def scores(self) -> dict[Any, float]:
        """Seed to the network's headline score, of the runs that have one."""
        found = {seed: record.score for seed, record in self.records.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    @cached_property
    def score(self) -> Spread | None:
        """The same over seeds; None if no run has one."""
        return spread(self.scores.values())

    @property
    def rank(self) -> float:
        """A number that is larger for better mean scores."""
        return self.measure.rank(self.score.mean if self.score else None)

    def cost(self, name: str) -> float | None:
        """Mean over seeds of one entry of the records' cost; None where no run has it."""
        found = [_number(record.cost.get(name)) for record in self.records.values()]
        return _mean(value for value in found if value)

    @property
    def memory(self) -> float | None:
        """Peak of a training step in bytes, as measured, else as predicted."""
        return self.cost("peak_memory") or self.cost("predicted_memory")

    @property
    def measured(self) -> bool:
        """Whether `memory` is measured."""
        return self.cost("peak_memory") is not None

    @cached_property
    def module_scores(self) -> list[float | None]:
        """The headline score of each module's head (K), mean over seeds; None where a module has none.

        Of end-to-end training that of the network alone, in however many modules.
        """
        runs, count = [record.module_scores for record in self.records.values()], self.modules
        count = 1 if self.method == BASELINE else count
        return [_mean(value for run in runs if k < len(run) and (value := run[k]) is not None) for k in range(count)]

    @cached_property
    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps and the mean over seeds of the network's own training loss, both (points)."""
        curves = [record.result.get("curve") or {} for record in self.records.values()]
        curves = [curve for curve in curves if curve.get("step") and len(curve["loss"]) == len(curve["step"])]
        curves = [curve for curve in curves if curve["step"] == curves[0]["step"]]
        if not curves:
            return np.array([]), np.array([])
        losses = [[np.nan if loss[-1] is None else float(loss[-1]) for loss in curve["loss"]] for curve in curves]
        return np.array(curves[0]["step"]), np.mean(losses, axis=0)


def spread(values: Iterable[float]) -> Spread | None:
    """Mean and sample standard deviation; None of nothing."""
    array = np.array(list(values), dtype=float)
    if not len(array):
        return None
    return Spread(float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None, len(array))


def difference(one: Series, other: Series) -> Spread | None:
    """The score of `one` less that of `other`, of percentages in points.

    Of the seeds that both have, the mean and spread of the differences, so that what a seed does to both falls out.
    Without a seed in common the difference of the means, and a count of 0. None where one has no score.
    """
    if one.score is None or other.score is None:
        return None
    return spread(paired(one, other)) or Spread(one.score.mean - other.score.mean, None, 0)


def paired(one: Series, other: Series) -> list[float]:
    """The score of `one` less that of `other`, for each seed that both have."""
    return [value - other.scores[seed] for seed, value in one.scores.items() if seed in other.scores]


def _number(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _mean(values: Iterable[float]) -> float | None:
    found = spread(values)
    return found.mean if found else None
