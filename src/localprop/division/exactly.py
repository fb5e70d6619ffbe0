"""From a network of local modules to the one that trains the same modules exactly."""

from dataclasses import replace

from localprop.errors import ConfigError
from localprop.network.loss import NoLoss
from localprop.network.network import LocalNetwork
from localprop.settings.recipe import END_TO_END


def exactly(net: LocalNetwork) -> LocalNetwork:
    """The same modules of the same backbone, with what they compute again and their kinetic term, trained exactly.

    It shares the backbone and its weights with `net`, and has no auxiliary nets.

    Args:
        net: a network with its recipe, as `localize` gives it, not compiled.

    Raises:
        ConfigError: it has one module.
    """
    recipe, modules = net.recipe, net.local_modules
    assert recipe is not None
    if len(modules) == 1:
        raise ConfigError("a finish trains several modules exactly, and there is one; choose more --modules")
    own = []
    for module in modules:
        again = [recipe.recomputation(unit, unit == module.units[-1]) for unit in module.units]
        own.append(module.with_loss(module.local_loss if module is modules[-1] else NoLoss(None), again))
    recipe = replace(recipe, method=END_TO_END, reach=0, method_kwargs={})
    return LocalNetwork(net.backbone, own, net.input_size, recipe, net.task).train(net.training)
