"""Plans of small models, which tests of several files share."""

import timm

from localprop import chain, plan
from localprop.memory.cost import Costs
from localprop.planning.planner import Planner
from localprop.planning.schedules import Link
from localprop.planning.search.finder import Finder
from localprop.planning.search.trials import Trials
from localprop.settings.config import OptimConfig
from localprop.settings.recipe import Recipe
from tiny import SIZE, build


def vit(depth):
    return timm.create_model("test_vit", img_size=32, patch_size=4, depth=depth, embed_dim=32, num_heads=2)


def small_plan(modules=(2, "max", 99), batch_size=16, model=None, **options):
    return plan(model or build("vit"), batch_size, modules=modules, method="greedy", input_size=SIZE, **options)


def names(rows):
    return [row.setting.name for row in rows]


def finder(model, batch_size=8, device="cpu", recipe=Recipe(), **changes):  # noqa: B008
    """What searches settings of a model; `changes` are the optimizer's."""
    units, optim = chain(model, SIZE), OptimConfig(**changes)
    planner = Planner(model, {False: Costs(model, units)}, recipe, {}, optim, None, batch_size, device, None, Link(1.0))
    return Finder(Trials(planner, (1,), []))
