"""What is proposed for a budget, in the order in which it is to be taken, and what finds it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from localprop.errors import ChainError
from localprop.planning.planner import Planner
from localprop.planning.rows import PlanRow
from localprop.planning.search.costed import Kind
from localprop.planning.search.finder import Finder
from localprop.planning.search.names import covering
from localprop.planning.search.trials import Trials, locally
from localprop.settings.recipe import END_TO_END, Frozen, Recipe

Proposed = Literal["exact", "frozen", "local"]
PROPOSED: dict[Proposed, Kind] = {"exact": "exact", "frozen": "exact", "local": "local"}
"""What may be proposed, in order: all of the network trained exactly; its second half alone; or local modules."""
SHORT: dict[Proposed, str] = {"exact": "exact", "frozen": "half frozen", "local": "local"}
"""What these are called where there is little room."""


@dataclass(frozen=True)
class Proposals:
    """What finds the settings of each way to train that is proposed.

    Attributes:
        finders: of each, in the order in which they are to be taken. From trained weights there is also the first half
            frozen, and the first of the local modules is frozen, unless something else was asked for.
        asks_local: whether local modules were asked for: then they are taken first.
    """

    finders: dict[Proposed, Finder]
    asks_local: bool

    def front(self, name: Proposed) -> list[PlanRow]:
        """See `Finder.front`."""
        return self.finders[name].front(PROPOSED[name])

    def fitting(self, budget: int) -> dict[Proposed, PlanRow | None]:
        """Of each the fastest setting that fits a budget; see `Finder.fitting`."""
        return {name: finder.fitting(PROPOSED[name], budget) for name, finder in self.finders.items()}

    def chosen(self, found: dict[Proposed, PlanRow | None], budget: int) -> PlanRow:
        """What is to be taken of what was found: the first that trains with the batch and the optimizer asked for.

        Raises:
            PlanError: nothing fits.
        """
        names: list[Proposed] = sorted(found, key=lambda name: self.asks_local and name != "local")
        rows = [row for name in names if (row := found[name])]
        if not rows:
            name: Proposed = "local" if self.asks_local else "frozen" if "frozen" in found else "exact"
            raise self.finders[name].nothing_fits(PROPOSED[name], budget)
        return next((row for row in rows if row.setting.same_numbers), rows[0])


def proposals(
    planner: Planner, modules: Sequence[int | Literal["max"]], rows: list[PlanRow], trained: bool
) -> Proposals:
    """What is proposed for a model.

    Args:
        planner: of it, with what all that is local has in common.
        modules: the numbers of modules that were asked for.
        rows: what has been simulated.
        trained: whether training starts from trained weights.
    """
    recipe, usual = planner.recipe, Finder(Trials(planner, modules, rows))
    asks_local = recipe.asks_local or planner.finish > 0 or (len(modules) == 1 and not recipe.end_to_end)
    finders: dict[Proposed, Finder] = {"exact": usual}
    if trained and not recipe.freeze and not recipe.freeze_modules:
        half, first = _first_units(planner, 2), _first_units(planner, 4) or _first_units(planner, 3)
        if half:
            kinetic = recipe.kinetic if recipe.end_to_end else None
            own = Recipe(END_TO_END, kinetic=kinetic, freeze=half)
            finders["frozen"] = _freezing(planner, own, rows, "half")
        if first and not asks_local:
            finders["local"] = _freezing(planner, replace(locally(recipe), freeze=first), rows, "first")
    return Proposals(finders | ({} if "local" in finders else {"local": usual}), asks_local)


def _freezing(planner: Planner, recipe: Recipe, rows: list[PlanRow], frozen: Frozen) -> Finder:
    return Finder(Trials(replace(planner, recipe=recipe), (2, "max"), rows, frozen))


def _first_units(planner: Planner, parts: int) -> tuple[str, ...] | None:
    """What `--freeze` names the first of so many parts that take the same time; None where there are not so many."""
    partition: Literal["stage", "compute"] = "stage" if planner.recipe.partition == "stage" else "compute"
    division = planner.division(Recipe(END_TO_END, parts, partition=partition), planner.optim.micro_batches)
    try:
        end = division.ends()[0]
    except ChainError:
        return None
    names = [unit.name for unit in division.units]
    return covering(names[:end], names[end:])
