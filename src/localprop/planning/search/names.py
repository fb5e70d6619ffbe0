"""The recipe of a way to train, with as few words as can be."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from localprop.planning.search.ways import Way
from localprop.settings.recipe import Recipe, Recomputation


def recipe_of(way: Way, base: Recipe, units: Sequence[str], usual: Recomputation) -> Recipe:
    """The recipe that trains in a way.

    Args:
        way: the way.
        base: the rest of the recipe.
        units: names of the chain's units.
        usual: what a unit computes again that the recipe does not name.
    """
    values = [value for module in way.recomputation for value in module]
    named = short(dict(zip(units, values, strict=True)), usual)
    cuts = tuple(units[end - 1] for end in way.ends[:-1])
    return replace(base, modules=None if cuts else 1, cuts=cuts or None, recompute_units=named or None)


@dataclass
class _Node:
    """A part of the names: "layers.0" has those of its blocks below it."""

    name: str
    value: Recomputation | None = None
    below: dict[str, "_Node"] = field(default_factory=dict)


def short(values: dict[str, Recomputation], usual: Recomputation) -> dict[str, Recomputation]:
    """The fewest names that give each unit its value, where the longest name that fits a unit decides.

    Args:
        values: what each unit computes again, by name.
        usual: what a unit does that no name fits.
    """
    root = _Node("")
    for unit, value in values.items():
        node = root
        for part in unit.split("."):
            name = f"{node.name}.{part}" if node.name else part
            node = node.below.setdefault(part, _Node(name))
        node.value = value
    found: dict[str, Recomputation] = {}
    for node in root.below.values():
        found |= _named(node, usual, sorted({*values.values(), usual}))
    return found


def _named(node: _Node, given: Recomputation, kinds: list[Recomputation]) -> dict[str, Recomputation]:
    """The fewest names for a node and all below it, where those above it give it a value."""
    options = []
    for kind in [node.value] if node.value is not None else [given, *(kind for kind in kinds if kind != given)]:
        own: dict[str, Recomputation] = {} if kind == given else {node.name: kind}
        for below in node.below.values():
            own |= _named(below, kind, kinds)
        options.append(own)
    return min(options, key=len)


def covering(units: Sequence[str], others: Collection[str]) -> tuple[str, ...]:
    """Names of units and of blocks of units, and patterns, that fit all of some units and none of the others.

    The shortest name that fits no other unit stands for a unit, and `blocks.[0-5]` for a row of such names.
    """

    def free(name: str) -> bool:
        return not any(f"{other}.".startswith(f"{name}.") for other in others)

    found: list[str] = []
    for unit in units:
        parts = unit.split(".")
        names = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
        found.append(next(filter(free, names), unit))
    shorter: list[str] = []
    for name in dict.fromkeys(found):
        row = _row(shorter[-1], name) if shorter else None
        shorter[-1:] = [row] if row else [*shorter[-1:], name]
    return tuple(shorter)


def _row(before: str, name: str) -> str | None:
    """A pattern for a name, or a row of names, and the one that follows it; None if it is not the next number."""
    found = re.fullmatch(r"(.*[.\d])(?:(\d)|\[(\d)-(\d)\])", before)
    if found is None:
        return None
    stem, first, last = found[1], found[2] or found[3], found[2] or found[4]
    return f"{stem}[{first}-{name[-1]}]" if last != "9" and name == f"{stem}{int(last) + 1}" else None
