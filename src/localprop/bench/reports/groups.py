"""Runs of a suite put together: seeds into series, and series into the comparisons that they belong to."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from localprop.bench.record import Record
from localprop.bench.reports.labels import setting_labels
from localprop.bench.series import BASELINE, Series, Spread, difference
from localprop.errors import shortened
from localprop.report.measures import Measure
from localprop.settings.flat import free

# What has to be the same before two scores, peaks or times say anything about each other.
CONDITIONS = ("task", "data", "model", "model_kwargs", "img_size", "amp", "amp_dtype", "epochs", "batch_size")
_QUIET = ("measure", "model_kwargs", "amp_dtype", "batch_size", "source", "epochs", "img_size", "amp")
# What the result of a run does not depend on. Results of version 0.1 may have those that are left out today.
_FREE = free("record") | {"plugin", "hold_on_device"}
# What end-to-end training has no use for, and with one module: runs of it that differ in these are the same run.
_AUXILIARY = {"decoder", "head", "head_kwargs", "reach", "method_kwargs"}
_DIVISION = {"modules", "partition", "cuts", "min_depth", "budget"}


@dataclass(frozen=True)
class Comparison:
    """Series that can be compared: the same data, model, length of training and so on.

    Attributes:
        name: what tells it from the others; data and model where it is the only one.
        series: one or more: end-to-end first, then by K, then by method.
        baseline: plain end-to-end training with one module, the best where there are several; None without.
    """

    name: str
    series: list[Series]
    baseline: Series | None

    @property
    def data(self) -> str:
        """The dataset's name."""
        return str(self.series[0].config.get("data"))

    @property
    def measure(self) -> Measure:
        """What its scores measure."""
        return self.series[0].measure

    @property
    def methods(self) -> list[str]:
        """Names of the methods, in the order of the series."""
        return list(dict.fromkeys(series.method for series in self.series))

    def gap(self, series: Series) -> Spread | None:
        """A setting's score less the baseline's; see `difference`."""
        return difference(series, self.baseline) if self.baseline else None

    def memory_ratio(self, series: Series) -> float | None:
        """Peak against the baseline's: measured against measured or predicted against predicted, else None."""
        return self.ratio(series, "peak_memory") or self.ratio(series, "predicted_memory")

    def time_ratio(self, series: Series) -> float | None:
        """Time per step against the baseline's: processor time on a CPU, which programs share, else on the clock."""
        both = (series, self.baseline) if self.baseline else (series,)
        on_cpu = all(record.cost.get("device") == "cpu" for s in both for record in s.records.values())
        return self.ratio(series, "processor_seconds_per_step" if on_cpu else "seconds_per_step")

    def ratio(self, series: Series, name: str) -> float | None:
        """An entry of the records' cost against the baseline's; None where one of them lacks it."""
        own, other = series.cost(name), self.baseline.cost(name) if self.baseline else None
        return own / other if own and other else None


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of the points (memory, rank) no other beats, from the least memory to the most.

    A point is beaten by one that takes no more memory and ranks at least as high; of equal points the first stays.
    """
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


def comparisons_of(records: Sequence[Record]) -> list[Comparison]:
    """Puts one or more records into series and comparisons; these come in the order of their first record."""
    groups = _grouped(records, _conditions)
    conditions = [_conditions(group[0]) for group in groups]
    varied = [key for key in conditions[0] if len({_key(values[key]) for values in conditions}) > 1]
    for key in _QUIET:  # what is not needed to tell comparisons apart is not part of their names
        fewer = [other for other in varied if other != key]
        if len({_comparison_name(values, fewer) for values in conditions}) == len(conditions):
            varied = fewer
    return [
        _comparison(group, _comparison_name(values, varied)) for group, values in zip(groups, conditions, strict=True)
    ]


def _conditions(record: Record) -> dict[str, Any]:
    """What has to be the same before two runs are compared; scores on validation and test images never are."""
    found = {key: record.config.get(key) for key in CONDITIONS}
    # None means the dataset's own size.
    return {
        **found,
        "img_size": record.data.get("img_size"),
        "evaluated_on": record.result.get("evaluated_on"),
        "measure": record.measure.name,
        "source": record.data.get("source"),
    }


def _comparison(records: list[Record], name: str) -> Comparison:
    groups = _grouped(records, _identity)
    configs = [_identity(group[0]) for group in groups]
    series = []
    for group, config, (label, short) in zip(groups, configs, setting_labels(configs, CONDITIONS), strict=True):
        seeds: dict[Any, Record] = {}
        for record in group:  # the same settings and seed give the same result, so a second run of them counts once
            seeds.setdefault(record.config.get("seed"), record)
        series.append(Series(label, short, config, seeds))
    plain = [s for s in series if s.undivided and not s.config.get("grad_checkpointing")]
    plain = [s for s in plain if s.config.get("recompute") is not True]
    baseline = max(plain, key=lambda s: s.rank, default=None)
    series.sort(key=lambda s: (s is not baseline, not s.undivided, s.modules, s.method))
    return Comparison(name, series, baseline)


def _comparison_name(conditions: dict[str, Any], varied: list[str]) -> str:
    words = []
    for key, value in conditions.items():
        if key in ("data", "model"):
            # Where only one of them differs, the other goes without saying.
            words += [shortened(value)] if key in varied or not {"data", "model"} & set(varied) else []
        elif key in varied:
            words.append(f"{value} px" if key == "img_size" else f"{key.replace('_', ' ')} {shortened(value)}")
    return shortened(", ".join(words), 120)


def _identity(record: Record) -> dict[str, Any]:
    """The settings that make a run what it is, but for the seed; K as it came out."""
    count, unused = len(record.network.get("modules") or [None]), _FREE | {"seed"}
    if record.config.get("method") == BASELINE:
        unused = unused | _AUXILIARY | (_DIVISION if count == 1 else set())
    config = {key: value for key, value in record.config.items() if key not in unused}
    return {**config, "method": config.get("method", "?"), "modules": count}


def _grouped(records: Sequence[Record], identity: Callable[[Record], Any]) -> list[list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(_key(identity(record)), []).append(record)
    return list(groups.values())


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
