"""A way to train: the method, K and the parts of its loss, which name a series across suites and datasets."""

from dataclasses import dataclass
from typing import Any

from localprop.bench.reports.groups import Comparison
from localprop.bench.reports.labels import DEFAULTS, usual_values
from localprop.bench.series import BASELINE, Series, Spread, difference
from localprop.report.texts import markdown

_NAMES = {
    "feature-reconstruction": "feature reconstruction",
    "infopro": "InfoPro",
    "trgl": "TRGL",
    "auglocal": "AugLocal",
}
_DECODING = ("feature-reconstruction", "infopro")
_FIXED = ("trgl", "auglocal")  # whose name says which head and kinetic term


@dataclass(frozen=True)
class Way:
    """A way to train.

    Attributes:
        method: its name.
        modules: K.
        decoder: None for the default one, and for a method without.
        head: None for the default one, or the method's own.
        reach: blocks that heads read ahead.
        kinetic: weight of the kinetic term; 0 where the method's name says it.
        finish: part of the epochs that are exact.
    """

    method: str
    modules: int
    decoder: str | None = None
    head: str | None = None
    reach: int = 0
    kinetic: float = 0.0
    finish: float = 0.0

    @property
    def order(self) -> tuple[Any, ...]:
        """Where it stands in a table: simple ways first."""
        parts = (self.decoder, self.head, self.reach, self.kinetic, self.finish)
        return (sum(map(bool, parts)), self.method, *(str(part or "") for part in parts), self.modules)


def way_of(config: dict[str, Any], modules: int) -> Way:
    """The way of a run with these settings."""
    method = str(config["method"])
    decoder = config.get("decoder") if method in _DECODING else None
    own = method in _FIXED or method == BASELINE
    head = None if own or config.get("head") in (None, "mlp") else str(config["head"])
    return Way(
        method,
        modules,
        decoder=None if decoder == DEFAULTS["decoder"] else decoder,
        head=head,
        reach=config.get("reach") or 0,
        kinetic=0.0 if method in _FIXED else config.get("kinetic") or 0.0,
        finish=config.get("finish") or 0.0,
    )


def ways_of(comparison: Comparison) -> dict[Way, Series]:
    """The ways of a comparison; of several series with one way it has that with the most usual settings."""
    usual = usual_values([series.config for series in comparison.series])

    def distance(series: Series) -> int:
        return sum(v is not None and v != usual[k] for k, v in series.config.items() if k in usual)

    found: dict[Way, Series] = {}
    for series in sorted(comparison.series, key=lambda s: (s is not comparison.baseline, distance(s))):
        found.setdefault(way_of(series.config, series.modules), series)
    return found


def way_words(way: Way) -> str:
    """A way in words, as Markdown, without K."""
    if way.method == BASELINE:
        name = BASELINE if way.modules == 1 else "exact"
    else:
        name = _NAMES.get(way.method) or markdown(way.method)
    return ", ".join([name, *map(markdown, way_parts(way))])


def way_parts(way: Way) -> list[str]:
    """The parts of a way that are not the default, in words."""
    parts = [f"{way.decoder} decoder"] if way.decoder else []
    parts += [f"{way.head} head"] if way.head else []
    parts += [f"reach {way.reach}"] if way.reach else []
    parts += [f"kinetic {way.kinetic:g}"] if way.kinetic else []
    return parts + ([f"finish {way.finish:g}"] if way.finish else [])


def plain_baseline(comparison: Comparison) -> Series | None:
    """End-to-end training without a kinetic term; else the comparison's baseline."""
    return ways_of(comparison).get(Way(BASELINE, 1)) or comparison.baseline


def own_gap(comparison: Comparison, series: Series) -> Spread | None:
    """The score of a series less that of end-to-end training with the same kinetic term, which helps that as well."""
    kinetic = way_of(series.config, series.modules).kinetic
    baseline = ways_of(comparison).get(Way(BASELINE, 1, kinetic=kinetic)) or plain_baseline(comparison)
    return difference(series, baseline) if baseline else None
