"""What an evaluation measures: how a number is called, shown and stored."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from localprop.report.formats import format_loss, format_percent
from localprop.system.reading import FLAG, TEXT


@dataclass(frozen=True)
class Measure:
    """One number that an evaluation gives.

    Attributes:
        name: such as "accuracy".
        short: its name in the columns of results.csv, such as "acc".
        percent: whether it is a percentage, from 0 to 100.
        more_is_better: whether a larger number is better.
    """

    name: str
    short: str
    percent: bool = False
    more_is_better: bool = True

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Measure":
        """The measure that `record` describes."""
        return cls(**{name: record[name] for name in MEASURE})

    def record(self) -> dict[str, Any]:
        """The same for a JSON file."""
        return asdict(self)

    @property
    def sign(self) -> str:
        """The sign of its unit."""
        return "%" if self.percent else ""

    @property
    def heading(self) -> str:
        """Its name, with the sign of its unit where it has one: "accuracy (%)"."""
        return f"{self.name} ({self.sign})" if self.sign else self.name

    def text(self, value: float | None) -> str:
        """A value without its sign; a dash where there is none (None, NaN)."""
        if value is None or math.isnan(value):
            return "-"
        return format_percent(value) if self.percent else format_loss(value)

    def rank(self, value: float | None) -> float:
        """A number that is larger for better values; less than any where there is none."""
        if value is None or math.isnan(value):
            return -math.inf
        return value if self.more_is_better else -value


ACCURACIES = (
    Measure("accuracy", "acc", percent=True),
    Measure("top5", "top5", percent=True),
    Measure("loss", "loss", more_is_better=False),
)
"""What a classification measures; and all that results.csv had in version 0.1."""
ACCURACY = ACCURACIES[0]

MEASURE = {"name": TEXT, "short": TEXT, "percent": FLAG, "more_is_better": FLAG}
"""What `Measure.record` gives in a JSON file."""
