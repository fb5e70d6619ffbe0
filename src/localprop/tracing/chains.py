"""A backbone as a chain of units: the places where exactly one tensor crosses, and the code between them.

A unit's code is generated from the traced graph and runs *on the backbone itself*: it looks modules and parameters
up there at each call. Nothing is copied, so the backbone stays usable, keeps its `state_dict` keys, and may be
moved, copied, frozen or trained by other code at any time. Forward hooks on blocks and layers run; those on a module
that the chain cuts open (a stage, a block that is split, the backbone itself) do not. What such a module computes
itself, outside the modules it calls, follows the mode (train or eval) of the backbone.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.fx.proxy import TraceError
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.checkpoint import checkpoint

from localprop.errors import ChainError, first_line, suggestion
from localprop.tracing.blocks import block_names, splittable
from localprop.tracing.cuts import Code, Cut, Forward, Segment
from localprop.tracing.tracer import fake_copy, trace


@dataclass(frozen=True)
class Unit:
    """A part of the backbone between two places where exactly one tensor crosses.

    Attributes:
        name: qualified name of the block in the backbone, or of the part of a block.
        shape: shape of the output, batch axis left out.
        parameters: qualified names of the parameters it used when it was traced; see `used`.
        depth: number of blocks, or parts of split blocks, in it; 0 for a stem, a downsampling, the classifier. In a
            model without lists of blocks, 1.
        buffers: qualified names of the buffers it uses, such as batch norm's statistics.
    """

    name: str
    shape: tuple[int, ...]
    parameters: tuple[str, ...]
    code: dict[bool, Code] = field(repr=False)  # by whether the backbone is in training mode
    switches: tuple[str, ...] = field(repr=False)  # modules on which timm's set_grad_checkpointing sets a flag
    depth: int = 1
    buffers: tuple[str, ...] = ()
    modules: tuple[str, ...] = field(default=(), repr=False)  # that it calls
    tensors: tuple[str, ...] = field(default=(), repr=False)  # that it takes from the backbone beside those

    def used(self, backbone: nn.Module, members: Callable[[nn.Module], Iterable[Tensor]]) -> Iterator[Tensor]:
        """The parameters or buffers that it uses as the backbone is now: adapters may have been added since.

        Args:
            backbone: the model.
            members: `nn.Module.parameters` or `nn.Module.buffers`.

        Raises:
            ChainError: a module that it calls is no longer there.
        """
        try:
            for name in self.modules:
                yield from members(backbone.get_submodule(name))
            for name in self.tensors:
                place, _, leaf = name.rpartition(".")
                owner = backbone.get_submodule(place)
                if is_parametrized(owner, leaf):
                    yield from members(owner.parametrizations[leaf])  # type: ignore[index, arg-type]
                else:
                    yield getattr(owner, leaf)
        except AttributeError as error:
            raise ChainError(
                f"the backbone was changed where unit {self.name} uses it ({error}); call localize again, after the "
                "change"
            ) from None

    def __call__(
        self, backbone: nn.Module, features: Tensor, context: dict[str, Any], grad_checkpointing: bool = False
    ) -> Tensor:
        """Runs the unit.

        Args:
            backbone: the model whose modules and parameters it uses.
            features: output of the unit before it; the image for the first.
            context: what units hand along beside the one tensor: values through which no gradient flows (grid
                sizes, rotary tables, masks). Start with an empty dict for each batch.
            grad_checkpointing: keep no activations, but run the unit again in backward; also where timm's
                `set_grad_checkpointing` was called on the backbone.
        """
        code = self.code[backbone.training]
        arguments = (backbone, features, *(context[name] for name in code.reads))
        if backbone.training and torch.is_grad_enabled() and (grad_checkpointing or self._checkpoints(backbone)):
            output = checkpoint(code.function, *arguments, use_reentrant=False)
        else:
            output = code.function(*arguments)
        if code.writes:
            output, values = output
            context.update(zip(code.writes, values, strict=True))
        return output

    def _checkpoints(self, backbone: nn.Module) -> bool:
        return any(backbone.get_submodule(name).grad_checkpointing for name in self.switches)


@dataclass(frozen=True)
class Chain(Sequence[Unit]):
    """The units of a backbone, in the order in which data passes them.

    Attributes:
        units: the units.
        input_size: (channels, height, width) of the image the shapes hold for.
        prefix_tokens: class and register tokens in front of the others, where the backbone tells (else None).
        output_format: "NCHW" or "NHWC", where the backbone tells (else None).
    """

    units: tuple[Unit, ...]
    input_size: tuple[int, int, int]
    prefix_tokens: int | None = None
    output_format: str | None = None

    def __getitem__(self, index: Any) -> Any:
        return self.units[index]

    def __len__(self) -> int:
        return len(self.units)

    def __iter__(self) -> Iterator[Unit]:
        return iter(self.units)

    def __str__(self) -> str:
        width = max(len(unit.name) for unit in self.units)
        return "\n".join(f"{unit.name:{width}}  {' x '.join(map(str, unit.shape))}" for unit in self.units)

    def names(self) -> str:
        """The units' names in one line, for messages."""
        return ", ".join(unit.name for unit in self.units)

    def position(self, name: str) -> int:
        """Number of units up to and including the last one called `name` or lying below it ("layers.0").

        Raises:
            ChainError: no unit has that name.
        """
        ends = [i for i, u in enumerate(self.units, 1) if u.name == name or u.name.startswith(name + ".")]
        if not ends:
            paths = [u.name.split(".") for u in self.units]
            known = {".".join(path[:depth]) for path in paths for depth in range(1, len(path) + 1)}
            raise ChainError(f"no unit is called {name!r}; {suggestion(name, known)}")
        return ends[-1]


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
    size = input_size or _own_input_size(model)
    split = splittable(model) if split_blocks else frozenset()
    while True:
        forwards = _trace_modes(model, size, split)
        segments = _segments(forwards)
        blocks = [[str(n.target) for n in s.nodes if forwards[True].is_block(n)] for s in segments[True]]
        opened, split = split, frozenset(name for name in split if _is_split(name, blocks))
        if split == opened:
            break  # else trace again, so that a block not split is called as it is
    codes = {t: forward.compile(segments[t]) for t, forward in forwards.items()}
    names = _unit_names([_main_parts(model, own, split) for own in blocks])
    switches = tuple(name for name, module in model.named_modules() if hasattr(module, "grad_checkpointing"))
    used = [tuple(forwards[True].parameters(segment)) for segment in segments[True]]
    units = tuple(
        Unit(
            name,
            tuple(segment.result.meta["value"].shape[1:]),
            used[i],
            {training: codes[training][i] for training in codes},
            switches,
            _depth(model, used[i]),
            tuple(forwards[True].buffers(segment)),
            *map(tuple, forwards[True].uses(segment)),
        )
        for i, (name, segment) in enumerate(zip(names, segments[True], strict=True))
    )
    prefix = getattr(model, "num_prefix_tokens", None)
    form = getattr(model, "output_fmt", None)
    return Chain(
        units,
        size,
        prefix_tokens=prefix if isinstance(prefix, int) else None,
        output_format=str(getattr(form, "value", form)) if form else None,
    )


def _trace_modes(model: nn.Module, size: tuple[int, int, int], opened: Set[str]) -> dict[bool, Forward]:
    """The forward in train mode (True) and in eval mode (False), traced with the blocks `opened` opened."""
    which = f"cannot cut {type(model).__name__} for images of {'x'.join(map(str, size))}"
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    try:
        with _no_logging("torch._subclasses.fake_tensor"):
            duplicate = fake_copy(model, mode)
            graphs = {t: trace(duplicate.train(t), size, dtype, mode, opened) for t in (True, False)}
    except Exception as error:  # a model's own code may raise anything at all
        raise ChainError(f"{which}: {_reason(error)}") from error
    for graph in graphs.values():
        result = next(node for node in graph.nodes if node.op == "output").args[0]
        value = result.meta["value"] if isinstance(result, fx.Node) else result
        if not isinstance(value, Tensor):
            kind = type(value).__name__.removeprefix("immutable_")
            raise ChainError(
                f"{which}: its forward gives a {kind}, not one tensor of logits; wrap the model in a module that "
                "gives the logits alone"
            )
    return {training: Forward(duplicate, graph) for training, graph in graphs.items()}


def _reason(error: Exception) -> str:
    text = first_line(error)[:200]
    if isinstance(error, TraceError):
        return f"{text}, which cannot be traced; move that code into a module of its own"
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        return f"what its forward does depends on pixel values ({text}); keep such code out of the model"
    return (
        f"its forward fails ({type(error).__name__}: {text}); check input_size, that forward takes images alone, "
        "and that the model is not compiled"
    )


def _segments(forwards: dict[bool, Forward]) -> dict[bool, list[Segment]]:
    """The segments between the cuts that both modes allow."""
    cuts = {training: forward.cuts() for training, forward in forwards.items()}
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


def _main_parts(model: nn.Module, own: list[str], split: Set[str]) -> list[str]:
    """What a unit is named after: its blocks; in a split block its largest part (an MLP, not the scale behind it)."""
    if any(part.startswith(name + ".") for name in split for part in own):
        return [max(own, key=lambda part: sum(p.numel() for p in model.get_submodule(part).parameters()))]
    return own


def _unit_names(blocks: list[list[str]]) -> list[str]:
    """Names units after what their blocks have in common, or after their last block if others lie there too."""
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


def _own_input_size(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) that a timm or torchvision model was built for."""
    settings = getattr(model, "pretrained_cfg", None) or {}
    size = settings.get("input_size")
    if type(model).__module__.startswith("torchvision."):
        size = (3, 224, 224)
    sides = (getattr(m, name, None) for m in model.modules() for name in ("img_size", "image_size"))
    pairs = ((side, side) if isinstance(side, int) else side for side in sides)
    pair = next((pair for pair in pairs if isinstance(pair, (tuple, list)) and len(pair) == 2), None)
    if pair:
        size = (size[0] if size else 3, int(pair[0]), int(pair[1]))
    if size is None:
        raise ChainError(
            f"{type(model).__name__} does not tell the size of its images; pass input_size=(channels, height, width)"
        )
    return (_channels(model, settings.get("first_conv"), size[0]), size[1], size[2])


def _channels(model: nn.Module, first: Any, default: int) -> int:
    """Channels of the image, from the layer that timm's settings name as the first."""
    names = first if isinstance(first, (tuple, list)) else [first] if first else []
    modules = dict(model.named_modules())
    found = next((modules[name].in_channels for name in names if hasattr(modules.get(name), "in_channels")), default)
    # A stem that folds 2 x 2 or 4 x 4 pixels into one has a first layer with so many times the channels.
    return default if found in (4 * default, 16 * default) else found


@contextmanager
def _no_logging(name: str) -> Iterator[None]:
    """Silences a logger: torch logs each error on fake tensors with its traceback, even one that is handled."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
