"""What a run's network is made of: recorded in run.json with every default filled in, and used when it is resumed.

So a later version's defaults, and a later way to balance modules, change no old run.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from localprop.division.resolve import resolved
from localprop.errors import CheckpointError
from localprop.registry import METHODS
from localprop.runs.description import RUN, read_description
from localprop.settings.earlier import options_as_recorded, settings_as_recorded
from localprop.settings.recipe import Recipe


def recipe_of_run(folder: Path, recipe: Recipe) -> Recipe:
    """What the network of a run that is resumed is made of, with every default as it was when the run began.

    Args:
        folder: the run folder.
        recipe: the one in its settings.

    Raises:
        CheckpointError: run.json is missing or damaged.
    """
    description = read_description(folder)
    modules, recorded = description["modules"], description.get("recipe")
    options = options_as_recorded(recipe.method, recorded) | recipe.options
    again = recipe.recompute
    if again is None:
        again = recorded["recompute"] if recorded else len(modules) > 1
    if not all(modules):
        raise CheckpointError(f"{folder / RUN} is damaged: a module has no units; restore it, or start a new run")
    # Cut where it was cut, however modules are balanced by now.
    cuts = tuple(units[-1] for units in modules[:-1])
    head = {**(recorded or {}).get("head_kwargs", {}), **(recipe.head_kwargs or {})}
    reach = settings_as_recorded(recorded or {})["reach"] if recipe.reach is None else recipe.reach
    known = replace(recipe, modules=len(modules), cuts=cuts, recompute=again, reach=reach)
    return replace(known, head_kwargs=head, method_kwargs=options)


def changed_default(recipe: Recipe, recorded: dict[str, Any] | None, device: str = "cpu") -> str | None:
    """Says which default has changed since a network was made; None if none has.

    Args:
        recipe: the settings.
        recorded: `Recipe.record()` of a network of these settings; None of one of version 0.1.
        device: the type of device on which that was trained.
    """
    if recipe.method not in METHODS:
        return None  # a plugin's, which is not looked into here
    now = resolved(recipe, device).record()
    then = options_as_recorded(recipe.method, recorded)
    again = recorded["recompute"] if recorded else now["modules"] > 1
    if recipe.recompute is None and again != now["recompute"]:
        return f"recompute is {now['recompute']} now where it is left open, and was {again} then"
    compared = [(name, now["method_kwargs"], then) for name in now["method_kwargs"] if name not in recipe.options]
    earlier = settings_as_recorded(recorded or {})
    compared += [(name, now, earlier) for name in ("head", "kinetic", "reach") if getattr(recipe, name) is None]
    for name, values, before in compared:
        own, old = (list(v) if isinstance(v, tuple) else v for v in (values[name], before.get(name, values[name])))
        if own != old:
            return f"{name} is {own} now where it is left open, and was {old} then"
    return None
