"""Which modules of a model are blocks, and which only hold blocks."""

from timm.models import is_notrace_module
from torch import nn


def has_matrix(module: nn.Module) -> bool:
    """Whether a module holds a weight of two or more axes. Norms and layer scales hold vectors only."""
    return any(p.ndim >= 2 for p in module.parameters())


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is a layer with an adapter beside it, as peft makes them: one layer still."""
    return isinstance(getattr(module, "base_layer", None), nn.Module)


def has_adapters(model: nn.Module) -> bool:
    """Whether layers of a model have adapters."""
    return any(map(is_adapted, model.modules()))


def without_adapters(module: nn.Module) -> nn.Module:
    """A module whose adapters are taken away, with what they have learned; it is changed in place."""
    if is_adapted(module):
        return module.base_layer  # type: ignore[return-value]
    for name, layer in list(module.named_modules()):
        if is_adapted(layer):
            module.set_submodule(name, layer.base_layer)
    return module


def container_classes(model: nn.Module) -> set[type]:
    """Classes with an instance in `model` that has a list of blocks at or below it.

    A class and not a module decides, so that a stage of one block is treated like a stage of many.
    """
    lists = [name for name, module in model.named_modules() if _is_block_list(module)]
    paths = {name.rsplit(".", up)[0] for name in lists for up in range(name.count(".") + 1)}
    return {type(model.get_submodule(path)) for path in paths}


def holds_blocks(module: nn.Module, containers: set[type]) -> bool:
    """Whether a module is to be cut inside, given the container classes of its model."""
    if isinstance(module, nn.Sequential):
        parts = [child for child in module if has_matrix(child)]
        return len(parts) > 1 or any(_is_composite(part) for part in parts)
    return type(module) in containers


def block_names(model: nn.Module) -> frozenset[str]:
    """Names of the blocks of `model`: the modules of those classes that lists of blocks hold."""
    lists = [module for module in model.modules() if _is_block_list(module)]
    listed = {child for module in lists for child in module.children() if _is_composite(child)}
    classes = {type(child) for child in listed} - container_classes(model)
    return frozenset(
        name
        for name, module in model.named_modules()
        if type(module) in classes and (module in listed or type(module) is not nn.Sequential)  # which may be anything
    )


def splittable(model: nn.Module) -> frozenset[str]:
    """Names of the blocks of `model` that may be split.

    torch's own layers stay whole: without gradients they compute otherwise than with, which no trace shows.
    """
    classes = {name: type(model.get_submodule(name)) for name in block_names(model)}
    return frozenset(
        name for name, c in classes.items() if not is_notrace_module(c) and not c.__module__.startswith("torch.nn.")
    )


def _is_composite(module: nn.Module) -> bool:
    """Whether a module is more than one layer."""
    return not is_adapted(module) and any(map(has_matrix, module.children()))


def _is_block_list(module: nn.Module) -> bool:
    """Whether a module's composite children are two or more, and numbered (0, stage1)."""
    parts = [name for name, child in module.named_children() if _is_composite(child)]
    return len(parts) > 1 and all(name[-1].isdigit() for name in parts)
