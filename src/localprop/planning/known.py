"""What accuracy local learning is known to cost: the gaps to end-to-end training that were measured or published.

`known.yaml` beside this file is written by `python benchmarks/publish_known.py` from the records in the repository.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from localprop.settings.recipe import Recipe


@dataclass(frozen=True)
class KnownGap:
    """The accuracy of one way to train against end-to-end training under the same protocol.

    Attributes:
        method: the method.
        modules: K.
        reach: blocks that heads read ahead.
        kinetic: whether the kinetic term is on, in the end-to-end training as well where that was run.
        finish: part of the epochs, the last ones, that were exact training.
        gaps: points, one for each dataset; below zero where it is the less accurate.
        seeds: runs of each; None where nobody says.
        protocol: network, data, length and source in words.
    """

    method: str
    modules: int
    reach: int
    kinetic: bool
    finish: float
    gaps: tuple[float, ...]
    seeds: int | None
    protocol: str


@cache
def known_gaps() -> tuple[KnownGap, ...]:
    """All of them; published ones first, then by the length of training."""
    text = Path(__file__).with_name("known.yaml").read_text(encoding="utf-8")
    return tuple(
        KnownGap(
            **{"reach": 0, "kinetic": False, "finish": 0.0, **row, "gaps": tuple(row["gaps"])},
            protocol=group["protocol"],
        )
        for group in yaml.safe_load(text)
        for row in group["rows"]
    )


def cost_in_accuracy(recipe: Recipe, finish: float = 0.0) -> str:
    """What a resolved recipe is known to cost in accuracy, as a sentence for a user.

    The gaps are those of its method, reach, kinetic term and finish with as many modules. Where that number of modules
    was not tried, the sentence says so and gives the nearest that was.
    """
    modules, reach, kinetic = recipe.modules or 1, recipe.reach or 0, bool(recipe.kinetic)
    if recipe.end_to_end:
        return "it has the accuracy of end-to-end training, whose gradients it computes"
    parts = reach, kinetic, finish
    own = [g for g in known_gaps() if g.method == recipe.method and (g.reach, g.kinetic, g.finish) == parts]
    if not own:
        return f"what {_words(recipe.method, *parts)} costs in accuracy has not been measured"
    nearest = min({gap.modules for gap in own}, key=lambda count: (abs(count - modules), count))
    found = "; ".join(_gap_text(gap) for gap in own if gap.modules == nearest)
    if nearest == modules:
        return f"accuracy against end-to-end training at K={modules}: {found}"
    return f"what K={modules} costs in accuracy has not been measured; at K={nearest}: {found}"


def _words(method: str, reach: int, kinetic: bool, finish: float) -> str:
    more = [*([f"reach {reach}"] if reach else []), *(["the kinetic term"] if kinetic else [])]
    more += [f"a finish of {finish:g}"] if finish else []
    return method + (f" with {' and '.join(more)}" if more else "")


def _gap_text(gap: KnownGap) -> str:
    seeds = "" if gap.seeds is None else ", 1 seed" if gap.seeds == 1 else f", {gap.seeds} seeds"
    ends = dict.fromkeys(f"{end:+.1f}" for end in (max(gap.gaps), min(gap.gaps)))
    return f"{' to '.join(ends)} points ({gap.protocol}{seeds})"
