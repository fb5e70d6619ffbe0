"""What fine-tuning came to in the records of the suites finetune-vit and finetune-lite."""

import json
from collections.abc import Callable, Iterable
from statistics import mean
from typing import Any, NamedTuple

from common import RESULTS

SUITES = ("finetune-vit", "finetune-lite")


class Way(NamedTuple):
    """A way to train.

    Attributes:
        method: the method.
        modules: K; 1 of end-to-end training, whatever is frozen.
        reach: blocks that heads read ahead.
        frozen: "half", "first" (module) or "all" (but the classifier) of the network; empty where all is trained.
    """

    method: str
    modules: int = 1
    reach: int = 0
    frozen: str = ""


WHOLE = Way("end-to-end")


class Outcome(NamedTuple):
    """What a way came to, at the learning rate with the best mean.

    Attributes:
        accuracy: percent, by seed.
        lr: the learning rate.
        memory: measured peak against end-to-end training; None where that was not measured.
        time: of a step, likewise.
    """

    accuracy: dict[int, float]
    lr: float
    memory: float | None
    time: float | None


class Task(NamedTuple):
    """A model, the images that it was trained further on, and what came of each way.

    Attributes:
        model: the model.
        data: the name of the images.
        protocol: size, length and what the accuracy is measured on, in words.
        outcomes: of each way; without end-to-end training there are none.
    """

    model: str
    data: str
    protocol: str
    outcomes: dict[Way, Outcome]

    def gap(self, way: Way) -> tuple[float, int]:
        """Points to end-to-end training, the mean over the seeds that both have, and how many these are."""
        own, whole = (self.outcomes[each].accuracy for each in (way, WHOLE))
        both = [seed for seed in own if seed in whole]
        return round(mean(own[seed] - whole[seed] for seed in both), 2), len(both)


def tasks(suite: str) -> list[Task]:
    """The tasks of a suite for which there are records, also of end-to-end training."""
    records = [json.loads(path.read_text()) for path in sorted((RESULTS / suite).glob("*.json"))]
    found = []
    for data in dict.fromkeys(record["config"]["data"] for record in records):
        own = [record for record in records if record["config"]["data"] == data]
        config, result = own[0]["config"], own[0]["result"]
        on = "held-out images" if result["evaluated_on"] == "validation" else f"{result['evaluated_on']} images"
        protocol = f"{config['img_size']} px, {config['epochs']} epochs, {on}"
        outcomes = _outcomes(own)
        if WHOLE in outcomes:
            found.append(Task(config["model"], data.removeprefix("folder:"), protocol, outcomes))
    return found


def _outcomes(records: Iterable[dict[str, Any]]) -> dict[Way, Outcome]:
    runs: dict[Way, dict[float, dict[int, dict[str, Any]]]] = {}
    for record in records:
        config = record["config"]
        if way := _way(config):
            runs.setdefault(way, {}).setdefault(config["lr"], {})[config["seed"]] = record
    if WHOLE not in runs:
        return {}
    best = {way: max(rates, key=lambda lr: _accuracy(rates[lr])) for way, rates in runs.items()}
    whole = runs[WHOLE][best[WHOLE]].values()
    return {
        way: Outcome(
            {seed: record["result"]["accuracy"] for seed, record in rates[best[way]].items()},
            best[way],
            _ratio(rates[best[way]].values(), whole, lambda cost: cost["peak_memory"]),
            _ratio(rates[best[way]].values(), whole, lambda cost: cost["seconds_per_step"]),
        )
        for way, rates in runs.items()
    }


def _accuracy(runs: dict[int, dict[str, Any]]) -> float:
    return mean(record["result"]["accuracy"] for record in runs.values())


def _ratio(
    ours: Iterable[dict[str, Any]], whole: Iterable[dict[str, Any]], of: Callable[[dict[str, Any]], float | None]
) -> float | None:
    """A mean cost against that of end-to-end training; None where it is not known, or was taken side by side."""
    if any(record["cost"].get("jobs", 1) > 1 for record in (*ours, *whole)):
        return None
    own, base = ([of(record["cost"]) for record in records] for records in (ours, whole))
    if None in (*own, *base):
        return None
    return round(mean(filter(None, own)) / mean(filter(None, base)), 3)


def _way(config: dict[str, Any]) -> Way | None:
    """Which way to train a run is of; None where it is none of those that are compared."""
    exact, freeze, first = config["method"] == WHOLE.method, config["freeze"], config["freeze_modules"]
    modules = config["modules"] or 1
    frozen = {(None, 0): "", (None, 1): "half" if exact else "first", (("all",), 0): "all"}.get(
        (tuple(freeze) if freeze else None, first)
    )
    if frozen is None or config["cuts"] or (exact and modules != (2 if frozen == "half" else 1)):
        return None
    return Way(config["method"], 1 if exact else modules, config["reach"] or 0, frozen)
