"""What accuracy local learning is known to cost: the gaps to end-to-end training that were measured or published.

`known.yaml` beside this file is written by `python benchmarks/publish_known.py` from the records in the repository.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from localprop.settings.recipe import END_TO_END, Frozen, Recipe


@dataclass(frozen=True)
class KnownGap:
    """The accuracy of one way to train against end-to-end training under the same protocol.

    Attributes:
        method: the method.
        modules: K.
        reach: blocks that heads read ahead.
        kinetic: whether the kinetic term is on, in the end-to-end training as well where that was run.
        finish: part of the epochs, the last ones, that were exact training.
        trained: whether training started from trained weights, also in the end-to-end training.
        frozen: what of the network was not trained.
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
    trained: bool = False
    frozen: Frozen = ""


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


def cost_in_accuracy(recipe: Recipe, finish: float = 0.0, trained: bool = False, frozen: Frozen = "") -> str:
    """What a resolved recipe is known to cost in accuracy, as a sentence for a user.

    The gaps are those of its method, reach, kinetic term, finish and frozen part with as many modules. Where that
    number of modules was not tried, the sentence says so and gives the nearest that was. What was measured from scratch
    is not told of trained weights.
    """
    modules, reach, kinetic = recipe.modules or 1, recipe.reach or 0, bool(recipe.kinetic)
    freezes = bool(recipe.freeze or recipe.freeze_modules)
    if recipe.end_to_end and not freezes:
        return "it has the accuracy of end-to-end training, whose gradients it computes"
    parts, own = (reach, kinetic, finish), list[KnownGap]()
    if bool(frozen) == freezes:  # else it is another part than those that were measured
        own = [g for g in known_gaps() if g.method == recipe.method and (g.reach, g.kinetic, g.finish) == parts]
        own = [gap for gap in own if (gap.trained, gap.frozen) == (trained, frozen)]
    if not own:
        what, where = _words(recipe.method, *parts, frozen, freezes), " with trained weights" if trained else ""
        return f"what {what} costs in accuracy has not been measured{where}"
    if recipe.end_to_end:
        return f"accuracy against training all of it: {'; '.join(map(_gap_text, own))}"
    nearest = min({gap.modules for gap in own}, key=lambda count: (abs(count - modules), count))
    found = "; ".join(_gap_text(gap) for gap in own if gap.modules == nearest)
    if nearest == modules:
        return f"accuracy against end-to-end training at K={modules}: {found}"
    return f"what K={modules} costs in accuracy has not been measured; at K={nearest}: {found}"


def _words(method: str, reach: int, kinetic: bool, finish: float, frozen: Frozen, freezes: bool) -> str:
    if method == END_TO_END:
        return "a frozen first half" if frozen else "freezing"
    more = ["a frozen first module" if frozen else "a frozen part"] if freezes else []
    more += [*([f"reach {reach}"] if reach else []), *(["the kinetic term"] if kinetic else [])]
    more += [f"a finish of {finish:g}"] if finish else []
    return method + (f" with {' and '.join(more)}" if more else "")


def _gap_text(gap: KnownGap) -> str:
    seeds = "" if gap.seeds is None else ", 1 seed" if gap.seeds == 1 else f", {gap.seeds} seeds"
    ends = dict.fromkeys(f"{end:+.1f}" for end in (max(gap.gaps), min(gap.gaps)))
    return f"{' to '.join(ends)} points ({gap.protocol}{seeds})"
