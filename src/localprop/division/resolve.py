"""What a recipe leaves open, filled in; and what it says wrong, in one line."""

from dataclasses import replace
from typing import TypeVar

from localprop.errors import ConfigError
from localprop.methods import check_method
from localprop.registry import DECODERS, HEADS, METHODS
from localprop.settings.options import check_options, options_of
from localprop.settings.recipe import Recipe

_Recipe = TypeVar("_Recipe", bound=Recipe)
_USUAL = {"head": "mlp", "kinetic": 0.0, "reach": 0}
"""What stands for a setting that is left open, where the method says nothing else."""


def resolved(recipe: Recipe, device: str = "cpu") -> Recipe:
    """The recipe with every default that depends on others filled in: modules, reach, recompute, head, options.

    Args:
        recipe: the recipe.
        device: the type of device on which the network is trained. On CUDA nothing is computed again unless it is asked
            for: it was measured to take 7% of a step of Swin-Tiny in four modules there.

    Raises:
        ConfigError: no such method, option, head or decoder, or a number of modules that the method does not allow.
    """
    count = check_method(recipe.method, recipe.count, recipe.options)
    recipe = with_methods_defaults(recipe)
    head = HEADS.lookup(recipe.head or "")  # also where the method has no use for it
    given = dict(recipe.head_kwargs or {})
    if not getattr(head, "needs_place", False):
        head = _without_options
    check_options("head", recipe.head or "", head, given)
    DECODERS.lookup(recipe.decoder)
    if count == 1 and recipe.reach:
        raise ConfigError(
            f"reach is {recipe.reach}, but one module has no other behind it; leave out reach, or choose more modules"
        )
    if recipe.end_to_end and recipe.reach:
        raise ConfigError(
            f"reach is {recipe.reach}, but method end-to-end has no heads that could read ahead; leave it out"
        )
    cheap = recipe.recompute
    if cheap is None:
        cheap = count > 1 and not recipe.end_to_end and device != "cuda"
    return replace(
        recipe,
        modules=count,
        recompute=cheap,
        head_kwargs={**options_of(head), **given},
        method_kwargs={**options_of(METHODS[recipe.method]), **recipe.options},
    )


def _without_options() -> None:
    """Stands for a head that is called with a layout and a number of outputs alone."""


def with_methods_defaults(recipe: _Recipe) -> _Recipe:
    """The recipe with head, kinetic term and reach filled in: as it says, else as its method does, else the usual ones.

    Where reach is left open, a single module reads nothing ahead, and neither does a head that resembles the units that
    follow: it is there to make that unnecessary.
    """
    usual = {**_USUAL, **getattr(METHODS.get(recipe.method), "defaults", {})}
    head = HEADS.get(recipe.head or usual["head"])
    if recipe.count == 1 or getattr(head, "needs_place", False):
        usual["reach"] = 0
    return replace(recipe, **{name: value for name, value in usual.items() if getattr(recipe, name) is None})
