"""Runs of a suite put together: seeds into settings, settings into tasks within which they are compared."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from localprop.bench.labels import setting_labels
from localprop.bench.record import Record

BASELINE = "end-to-end"
# What has to be the same before two accuracies, peaks or times say anything about each other.
TASK = ("data", "model", "model_kwargs", "img_size", "amp", "amp_dtype", "epochs", "batch_size")
# What a run does not depend on; names and places.
_FREE = {"output", "experiment", "resume", "workers", "data_dir", "download", "checkpoint_steps", "checkpoint_hist"}
# What end-to-end training has no use for: runs of it that differ in these are the same run.
_LOCAL = {"modules", "decoder", "head", "partition", "cuts", "min_depth", "budget", "method_kwargs"}


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (None of a single value) of `count` values."""

    mean: float
    std: float | None
    count: int

    def text(self, sign: str = "") -> str:
        """Two digits after the point, "80.12 ± 0.34"; with `sign` "+" the mean always has a sign."""
        return f"{self.mean:{sign}.2f}" + ("" if self.std is None else f" ± {self.std:.2f}")


@dataclass(frozen=True)
class Setting:
    """Runs that differ in their seed alone.

    Attributes:
        label: the method and what else tells the setting from the others of its task.
        short: the same without the method but for end-to-end; always with K.
        config: the settings, without the seed and without what changes nothing.
        records: one per seed.
    """

    label: str
    short: str
    config: dict[str, Any]
    records: dict[Any, Record]

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.config["method"])

    @property
    def modules(self) -> int:
        """K."""
        return int(self.config["modules"])

    @cached_property
    def accuracies(self) -> dict[Any, float]:
        """Seed to percent, of the runs that have an accuracy."""
        found = {seed: _number(record.result.get("accuracy")) for seed, record in self.records.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    @cached_property
    def accuracy(self) -> Spread | None:
        """Over seeds, in percent; None if no run has one."""
        return spread(self.accuracies.values())

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
    def module_accuracies(self) -> list[float | None]:
        """Percent of each module's head (K), mean over seeds; None where a module has none."""
        runs = [record.result.get("module_accuracies") or [] for record in self.records.values()]
        return [
            _mean(value for run in runs if k < len(run) and (value := _number(run[k])) is not None)
            for k in range(self.modules)
        ]

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


@dataclass(frozen=True)
class Task:
    """Settings that can be compared: the same data, model, length of training and so on.

    Attributes:
        name: what tells the task from the others; data and model where it is the only one.
        settings: one or more: end-to-end first, then by K, then by method.
        baseline: plain end-to-end training, the most accurate where there are several; None without one.
    """

    name: str
    settings: list[Setting]
    baseline: Setting | None

    @property
    def methods(self) -> list[str]:
        """Names of the methods, in the order of the settings."""
        return list(dict.fromkeys(setting.method for setting in self.settings))

    def gap(self, setting: Setting) -> Spread | None:
        """Accuracy less the baseline's, in points; see `difference`."""
        return difference(setting, self.baseline) if self.baseline else None

    def memory_ratio(self, setting: Setting) -> float | None:
        """Peak against the baseline's: measured against measured or predicted against predicted, else None."""
        return self.ratio(setting, "peak_memory") or self.ratio(setting, "predicted_memory")

    def ratio(self, setting: Setting, name: str) -> float | None:
        """An entry of the records' cost against the baseline's; None where one of them lacks it."""
        own, other = setting.cost(name), self.baseline.cost(name) if self.baseline else None
        return own / other if own and other else None


def spread(values: Iterable[float]) -> Spread | None:
    """Mean and sample standard deviation; None of nothing."""
    array = np.array(list(values), dtype=float)
    if not len(array):
        return None
    return Spread(float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None, len(array))


def difference(one: Setting, other: Setting) -> Spread | None:
    """Accuracy of `one` less that of `other`, in points.

    Of the seeds that both have, the mean and spread of the differences, so that what a seed does to both falls out.
    Without a seed in common the difference of the means, and a count of 0. None where one has no accuracy.
    """
    if one.accuracy is None or other.accuracy is None:
        return None
    common = [seed for seed in one.accuracies if seed in other.accuracies]
    if not common:
        return Spread(one.accuracy.mean - other.accuracy.mean, None, 0)
    return spread(one.accuracies[seed] - other.accuracies[seed] for seed in common)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of the points (memory, accuracy) no other beats, from the least memory to the most.

    A point is beaten by one that takes no more memory and is at least as accurate; of equal points the first stays.
    """
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


def tasks_of(records: Sequence[Record]) -> list[Task]:
    """Puts one or more records into settings and tasks; tasks come in the order of their first record."""
    # Accuracies on validation and on test images are never put side by side.
    groups = _grouped(records, lambda r: [*(r.config.get(key) for key in TASK), r.result.get("evaluated_on")])
    varied = [key for key in TASK if len({_key(group[0].config.get(key)) for group in groups}) > 1]
    return [_task(group, varied) for group in groups]


def _task(records: list[Record], varied: list[str]) -> Task:
    groups = _grouped(records, _identity)
    configs = [_identity(group[0]) for group in groups]
    settings = []
    for group, config, (label, short) in zip(groups, configs, setting_labels(configs, TASK), strict=True):
        seeds: dict[Any, Record] = {}
        for record in group:  # the same settings and seed give the same result, so a second run of them counts once
            seeds.setdefault(record.config.get("seed"), record)
        settings.append(Setting(label, short, config, seeds))
    plain = [s for s in settings if s.method == BASELINE and not s.config.get("grad_checkpointing")]
    plain = [s for s in plain if s.config.get("recompute") is not True]
    baseline = max(plain, key=lambda s: s.accuracy.mean if s.accuracy else -math.inf, default=None)
    settings.sort(key=lambda s: (s is not baseline, s.method != BASELINE, s.modules, s.method))
    return Task(_task_name(records[0], varied), settings, baseline)


def _task_name(record: Record, varied: list[str]) -> str:
    config, words = record.config, []
    if "data" in varied or "model" not in varied:
        words.append(str(config.get("data", record.data.get("name"))))
    if "model" in varied or not varied:
        words.append(str(config.get("model")))
    for key in varied:
        if key == "img_size":
            words.append(f"{record.data.get('img_size')} px")
        elif key not in ("data", "model"):
            words.append(f"{key.replace('_', ' ')} {config.get(key)}")
    return ", ".join(words)


def _identity(record: Record) -> dict[str, Any]:
    """The settings that make a run what it is, but for the seed; K as it came out."""
    unused = _FREE | {"seed"} | (_LOCAL if record.config.get("method") == BASELINE else set())
    config = {key: value for key, value in record.config.items() if key not in unused}
    return {**config, "method": config.get("method", "?"), "modules": len(record.network.get("modules") or [None])}


def _grouped(records: Sequence[Record], identity: Callable[[Record], Any]) -> list[list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(_key(identity(record)), []).append(record)
    return list(groups.values())


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _number(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _mean(values: Iterable[float]) -> float | None:
    found = spread(values)
    return found.mean if found else None
