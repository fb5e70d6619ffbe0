"""From a model to the chain of its units."""

from collections.abc import Set

from torch import nn

from localprop.tracing.blocks import block_names, splittable
from localprop.tracing.modes import BothModes, trace_modes
from localprop.tracing.reasons import why_not_opened
from localprop.tracing.sizes import own_input_size
from localprop.tracing.units import Chain, Unit


def chain(model: nn.Module, input_size: tuple[int, int, int] | None = None, split_blocks: bool = False) -> Chain:
    """Finds the units of `model`: traces its forward on fake tensors, without data and without changing it.

    A model whose parts cannot be told apart (several tensors are alive everywhere) is one unit.

    Args:
        model: any image model whose forward takes a batch of images and gives logits.
        input_size: (channels, height, width) of the images; where left out, what the model says of itself.
        split_blocks: whether to cut inside blocks too, between an attention and its MLP, say. A block that cannot
            be cut inside stays one unit; every block is a whole number of units.

    Raises:
        ChainError: the forward cannot be traced, or does not give one tensor.
    """
    size = input_size or own_input_size(model)
    split, whole = frozenset[str](), dict[str, str]()
    if split_blocks:
        split = splittable(model)
        others = {name: model.get_submodule(name) for name in sorted(block_names(model) - split)}
        # A sequence is always looked into.
        whole = {name: why_not_opened(m) for name, m in others.items() if not isinstance(m, nn.Sequential)}
    while True:
        modes = trace_modes(model, size, split)
        whole |= modes.whole
        opened, split = split, frozenset(name for name in split if _is_split(name, modes.blocks))
        for name in sorted(opened - split - whole.keys()):
            inside = [part for own in modes.blocks for part in own if part.startswith(name + ".")]
            whole[name] = modes.obstacle(name, inside) or "the model cannot be cut right before it or right after it"
        if split == opened:
            break  # else trace again, so that a block not split is called as it is
    units = _units(model, modes, _unit_names([_main_parts(model, own, split) for own in modes.blocks]))
    has_blocks = bool(block_names(model))
    for unit, own in zip(units, modes.blocks, strict=True):
        several = unit.depth > 1 or not has_blocks
        if several and unit.name not in whole and (why := modes.obstacle(unit.name, own)):
            whole[unit.name] = why
    prefix = getattr(model, "num_prefix_tokens", None)
    form = getattr(model, "output_fmt", None)
    return Chain(
        units,
        size,
        prefix_tokens=prefix if isinstance(prefix, int) else None,
        output_format=str(getattr(form, "value", form)) if form else None,
        whole=whole,
    )


def _units(model: nn.Module, modes: BothModes, names: list[str]) -> tuple[Unit, ...]:
    """The units that the segments of a forward make."""
    codes = {training: forward.compile(modes.segments[training]) for training, forward in modes.forwards.items()}
    switches = tuple(name for name, module in model.named_modules() if hasattr(module, "grad_checkpointing"))
    forward, units = modes.forwards[True], []
    for i, segment in enumerate(modes.segments[True]):
        parameters = tuple(forward.parameters(segment))
        modules, tensors = forward.uses(segment)
        units.append(
            Unit(
                name=names[i],
                shape=tuple(segment.result.meta["value"].shape[1:]),
                parameters=parameters,
                code={training: codes[training][i] for training in codes},
                switches=switches,
                depth=_depth(model, parameters),
                buffers=tuple(forward.buffers(segment)),
                modules=tuple(modules),
                tensors=tuple(tensors),
            )
        )
    return tuple(units)


def _depth(model: nn.Module, parameters: tuple[str, ...]) -> int:
    """Number of blocks that have some of these parameters."""
    names = block_names(model)
    return sum(any(p.startswith(f"{name}.") for p in parameters) for name in names) if names else 1


def _is_split(name: str, blocks: list[list[str]]) -> bool:
    """Whether the block `name` is a whole number of units, and more than one; `blocks` has the parts of each unit."""
    inside = [[block.startswith(name + ".") for block in own] for own in blocks]
    touched = [own for own in inside if any(own)]
    return len(touched) > 1 and all(map(all, touched))


def _main_parts(model: nn.Module, own: list[str], split: Set[str]) -> list[str]:
    """What a unit is named after: its blocks; in a split block its largest part (an MLP, not the scale after it)."""
    if any(part.startswith(name + ".") for name in split for part in own):
        return [max(own, key=lambda part: sum(p.numel() for p in model.get_submodule(part).parameters()))]
    return own


def _unit_names(blocks: list[list[str]]) -> list[str]:
    """Names units after what their blocks have in common, or after their last block if other units have that too."""
    names = []
    for i, own in enumerate(blocks):
        others = [name for j, block in enumerate(blocks) if j != i for name in block]
        paths = [name.split(".") for name in own]
        shared = next((n for n, column in enumerate(zip(*paths, strict=False)) if len(set(column)) > 1), None)
        common = ".".join(paths[0][:shared]) if paths else "output"
        if not common or any(f"{other}.".startswith(f"{common}.") for other in others):
            common = own[-1]
        names.append(common)
    return names
