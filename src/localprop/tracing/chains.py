"""From a model to the chain of its units."""

import logging
from collections.abc import Iterator, Set
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from localprop.errors import ChainError
from localprop.tracing.blocks import block_names, splittable
from localprop.tracing.copies import fake_copy
from localprop.tracing.cuts import Cut, Forward, Segment
from localprop.tracing.naming import main_parts, unit_names
from localprop.tracing.reasons import why_no_chain, why_not_opened
from localprop.tracing.sizes import own_input_size
from localprop.tracing.tracer import trace
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
        forwards = _trace_modes(model, size, split)
        cuts = {training: forward.cuts() for training, forward in forwards.items()}
        segments = _segments(forwards, cuts)
        blocks = [[str(n.target) for n in s.nodes if forwards[True].is_block(n)] for s in segments[True]]
        whole |= _whole_parts(forwards)
        opened, split = split, frozenset(name for name in split if _is_split(name, blocks))
        for name in sorted(opened - split - whole.keys()):
            inside = [part for own in blocks for part in own if part.startswith(name + ".")]
            why = _obstacle(forwards, cuts, inside) or "no cut lies right before it or right after it"
            whole[name] = why.replace(f"{name}.", "")
        if split == opened:
            break  # else trace again, so that a block not split is called as it is
    units = _units(model, forwards, segments, unit_names([main_parts(model, own, split) for own in blocks]))
    has_blocks = bool(block_names(model))
    for unit, own in zip(units, blocks, strict=True):
        several = unit.depth > 1 or not has_blocks
        if several and unit.name not in whole and (why := _obstacle(forwards, cuts, own)):
            whole[unit.name] = why.replace(f"{unit.name}.", "")
    prefix = getattr(model, "num_prefix_tokens", None)
    form = getattr(model, "output_fmt", None)
    return Chain(
        units,
        size,
        prefix_tokens=prefix if isinstance(prefix, int) else None,
        output_format=str(getattr(form, "value", form)) if form else None,
        whole=whole,
    )


def _trace_modes(model: nn.Module, size: tuple[int, int, int], opened: Set[str]) -> dict[bool, Forward]:
    """The forward in train mode (True) and in eval mode (False), traced with the blocks `opened` opened."""
    which = f"cannot cut {type(model).__name__} for images of {'x'.join(map(str, size))}"
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    try:
        with _no_logging("torch._subclasses.fake_tensor"):
            duplicate = fake_copy(model, mode)
            traces = {t: trace(duplicate.train(t), size, dtype, mode, opened) for t in (True, False)}
    except Exception as error:  # a model's own code may raise anything at all
        raise ChainError(f"{which}: {why_no_chain(error)}") from error
    for graph, _ in traces.values():
        result = next(node for node in graph.nodes if node.op == "output").args[0]
        value = result.meta["value"] if isinstance(result, fx.Node) else result
        if not isinstance(value, Tensor):
            kind = type(value).__name__.removeprefix("immutable_")
            raise ChainError(
                f"{which}: its forward gives a {kind}, not one tensor of logits; wrap the model in a module that "
                "gives the logits alone"
            )
    return {training: Forward(duplicate, *traced) for training, traced in traces.items()}


def _units(
    model: nn.Module, forwards: dict[bool, Forward], segments: dict[bool, list[Segment]], names: list[str]
) -> tuple[Unit, ...]:
    """The units that segments of the forward in both modes make."""
    codes = {training: forward.compile(segments[training]) for training, forward in forwards.items()}
    switches = tuple(name for name, module in model.named_modules() if hasattr(module, "grad_checkpointing"))
    forward, units = forwards[True], []
    for i, segment in enumerate(segments[True]):
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


def _whole_parts(forwards: dict[bool, Forward]) -> dict[str, str]:
    """Why parts were called as they are, in train mode or in eval mode."""
    whole: dict[str, str] = {}
    for training, mode in ((True, "train"), (False, "eval")):
        for name, why in forwards[training].whole.items():
            only = "" if name in forwards[not training].whole else f" (in {mode} mode)"
            whole.setdefault(name, why + only)
    return whole


def _obstacle(forwards: dict[bool, Forward], cuts: dict[bool, dict[str, Cut]], blocks: list[str]) -> str | None:
    """Why there is no cut after the first of consecutive blocks that could be followed by one; None for one block."""
    for name, after in pairwise(blocks):
        for training, mode in ((True, "train"), (False, "eval")):
            if name not in cuts[training]:
                if outer := next((part for part in forwards[training].whole if name.startswith(f"{part}.")), None):
                    return f"{outer} stays whole in {mode} mode"
                only = "" if name not in cuts[not training] else f" (in {mode} mode)"
                return forwards[training].obstacle(name) + only
        if name != after:
            return f"parameters are used both up to {name} and after it; give each side its own, if that may be"
    return None


def _segments(forwards: dict[bool, Forward], cuts: dict[bool, dict[str, Cut]]) -> dict[bool, list[Segment]]:
    """The segments between the cuts that both modes allow."""
    ends = [name for name in cuts[True] if name in cuts[False]]
    for training, forward in forwards.items():
        ends = _untied(forward, cuts[training], ends)
    return {t: forward.split([cuts[t][end] for end in ends]) for t, forward in forwards.items()}


def _untied(forward: Forward, cuts: dict[str, Cut], ends: list[str]) -> list[str]:
    """The ends left when no parameter may be used on both sides of a cut."""
    used = [set(forward.parameters(segment)) for segment in forward.split([cuts[end] for end in ends])]
    return [end for i, end in enumerate(ends, 1) if set().union(*used[:i]).isdisjoint(set().union(*used[i:]))]


def _depth(model: nn.Module, parameters: tuple[str, ...]) -> int:
    """Number of blocks of which some of these parameters are part."""
    names = block_names(model)
    return sum(any(p.startswith(f"{name}.") for p in parameters) for name in names) if names else 1


def _is_split(name: str, blocks: list[list[str]]) -> bool:
    """Whether the block `name` is a whole number of units, and more than one; `blocks` has the parts of each unit."""
    inside = [[block.startswith(name + ".") for block in own] for own in blocks]
    touched = [own for own in inside if any(own)]
    return len(touched) > 1 and all(map(all, touched))


@contextmanager
def _no_logging(name: str) -> Iterator[None]:
    """Silences a logger: torch logs each error on fake tensors with its traceback, even one that is handled."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
