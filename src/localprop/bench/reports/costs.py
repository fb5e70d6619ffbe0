"""What a step of each way to train takes at full size: memory and time of Swin-Tiny at 224 px, and its exact rivals.

`costs.yaml` in the folder above is written by `python benchmarks/costs.py`.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from localprop.bench.reports.published import Published
from localprop.bench.reports.tables import ratio_text, table
from localprop.bench.reports.ways import Way, way_of, way_words
from localprop.bench.series import BASELINE, Series

STAGE = "stage"


@dataclass(frozen=True)
class Cost:
    """What a step takes, relative to end-to-end training.

    Attributes:
        way: the way to train.
        cut: "stage", "balanced", or the names that the chain is cut after.
        name: of what is no way, such as activation checkpointing; else empty.
        fp32: peak memory in float32.
        memory: peak memory in bfloat16 mixed precision.
        time: expected time in that precision.
        exact_time: that of the fastest exact training that fits into this memory; None where it was not looked for.
    """

    way: Way
    cut: str | tuple[str, ...]
    name: str
    fp32: float
    memory: float
    time: float
    exact_time: float | None

    @property
    def words(self) -> str:
        """What it is called in a table, as Markdown."""
        count = f", K={self.way.modules}" if self.way.modules > 1 else ""
        return self.name or f"{way_words(self.way)}{count}"

    @property
    def exact(self) -> bool:
        """Whether its gradients are those of end-to-end training."""
        return self.way.method == BASELINE


@cache
def costs() -> tuple[Cost, ...]:
    """All of them, end-to-end training first."""
    text = Path(__file__).parents[1].joinpath("costs.yaml").read_text(encoding="utf-8")
    return tuple(_cost(row) for row in yaml.safe_load(text))


def _cost(row: dict[str, Any]) -> Cost:
    cut, settings = row["cut"], row["settings"]
    return Cost(
        way=way_of(settings, settings["modules"]),
        cut=cut if isinstance(cut, str) else tuple(cut),
        name=row.get("name", ""),
        fp32=row["fp32"],
        memory=row["memory"],
        time=row["time"],
        exact_time=row.get("exact_time"),
    )


def cost_of(series: Series) -> Cost | None:
    """What a step of a series takes at full size, with the cuts that the series has; None where it is not known."""
    cuts = series.config.get("cuts")
    way, cut = way_of(series.config, series.modules), tuple(cuts) if cuts else series.config.get("partition")
    return next((cost for cost in costs() if not cost.exact and (cost.way, cost.cut) == (way, cut)), None)


def stage_cost(way: Way) -> Cost | None:
    """What a step of a way takes in a module for each stage; of end-to-end training whatever its cuts."""
    return next((c for c in costs() if c.way == way and (c.cut == STAGE or (c.exact and not c.name))), None)


def paper_memory_table(published: Published) -> str:
    """A Markdown table of peak memory on the paper's terms: cut by stage, nothing recomputed, in float32."""
    two = {cost.way: cost for cost in costs() if cost.cut == ("layers.0",) and not cost.way.reach}
    four = {cost.way: cost for cost in costs() if cost.cut == STAGE and not cost.exact}
    rows = []
    for way, cost in two.items():
        more = Way(way.method, 4, way.decoder)
        plain = way.decoder is None
        theirs = [published.memory.get(k, {}).get(way.method) if plain else None for k in (2, 4)]
        ours = [cost, four.get(more)]
        cells = [
            ratio_text(value)
            for pair in zip(theirs, [own.fp32 if own else None for own in ours], strict=True)
            for value in pair
        ]
        rows.append([way_words(way), *cells])
    heads = ["", "K=2: published", "here", "K=4: published", "here"]
    return table(heads, rows)


def best_table() -> str:
    """A Markdown table of memory and time: local settings from the most memory to the least, then exact ones."""
    found = sorted((cost for cost in costs() if not cost.exact and _worth_showing(cost)), key=lambda cost: -cost.memory)
    rows = [[_where_cut(cost), *_numbers(cost)] for cost in found]
    rows += [[cost.words, *_numbers(cost)] for cost in costs() if cost.exact]
    return table(["", "memory", "time", "time of the fastest exact training in that memory"], rows)


def _worth_showing(cost: Cost) -> bool:
    """The default method with its default parts, beside which reach is shown."""
    way = cost.way
    plain = (way.method, way.decoder, way.kinetic, way.finish) == ("feature-reconstruction", None, 0.0, 0.0)
    return plain and isinstance(cost.cut, str)


def _where_cut(cost: Cost) -> str:
    return f"{cost.words}, {'by stage' if cost.cut == STAGE else cost.cut}"


def _numbers(cost: Cost) -> list[str]:
    return [ratio_text(value) for value in (cost.memory, cost.time, cost.exact_time)]
