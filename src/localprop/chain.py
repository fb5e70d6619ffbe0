"""A backbone as a chain of units: the places where exactly one tensor crosses, and the code between them.

A unit's code is generated from the traced graph and runs *on the backbone itself*: it looks modules and parameters
up there at each call. Nothing is copied, so the backbone stays usable, keeps its `state_dict` keys, and may be
moved, copied, frozen or trained by other code at any time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from localprop.errors import ChainError, suggestion
from localprop.tracing import fake_copy, has_matrix, trace


@dataclass(frozen=True)
class _Code:
    """The generated code of one unit in one mode (train or eval)."""

    function: Callable[..., Any]  # (backbone, features, *values read) -> output, or (output, values written)
    reads: tuple[str, ...]
    writes: tuple[str, ...]


@dataclass(frozen=True)
class Unit:
    """A part of the backbone between two places where exactly one tensor crosses.

    Attributes:
        name: qualified name of the block in the backbone.
        shape: shape of the output, batch axis left out.
        parameters: qualified names of the parameters it uses.
    """

    name: str
    shape: tuple[int, ...]
    parameters: tuple[str, ...]
    code: dict[bool, _Code] = field(repr=False)

    def __call__(self, backbone: nn.Module, features: Tensor, context: dict[str, Any]) -> Tensor:
        """Runs the unit.

        Args:
            backbone: the model whose modules and parameters it uses.
            features: output of the unit before it; the image for the first.
            context: what units hand along beside the one tensor: values that depend on the image's shape alone
                (grid sizes, rotary tables). Carries no gradient. Start with an empty dict for each batch.
        """
        code = self.code[backbone.training]
        arguments = [context[name] for name in code.reads]
        if backbone.training and torch.is_grad_enabled() and _checkpoints(backbone):
            output = checkpoint(code.function, backbone, features, *arguments, use_reentrant=False)
        else:
            output = code.function(backbone, features, *arguments)
        if code.writes:
            output, values = output
            context.update(zip(code.writes, values, strict=True))
        return output


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
            raise ChainError(f"no unit is called {name!r}; {suggestion(name, [u.name for u in self.units])}")
        return ends[-1]


def chain(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> Chain:
    """Finds the units of `model`: traces its forward on fake tensors, without data and without changing it.

    Args:
        model: any image model whose forward takes a batch of images and gives logits.
        input_size: (channels, height, width) of the images; where left out, what the model says of itself.

    Raises:
        ChainError: the forward cannot be traced, or does not give one tensor.
    """
    size = input_size or _own_input_size(model)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    duplicate = fake_copy(model, mode)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    with mode:
        image = torch.empty(2, *size, dtype=dtype)
    graphs = {}
    for training in (True, False):
        duplicate.train(training)
        try:
            graphs[training] = trace(duplicate, image, mode)
        except Exception as error:  # a model's own code may raise anything at all
            raise ChainError(
                f"cannot cut {type(model).__name__} for images of {'x'.join(map(str, size))}: its forward fails or "
                f"cannot be traced ({_first_line(error)}); check input_size, or use method end-to-end"
            ) from error
        result = next(n for n in graphs[training].nodes if n.op == "output").args[0]
        if not isinstance(result, fx.Node) or not isinstance(result.meta["value"], Tensor):
            raise ChainError(
                f"cannot cut {type(model).__name__}: its forward gives a {type(result).__name__} of values, not one "
                "tensor of logits; wrap the model so that it gives the logits"
            )
    prefix = getattr(model, "num_prefix_tokens", None)
    form = getattr(model, "output_fmt", None)
    return Chain(
        tuple(_units(duplicate, graphs)),
        size,
        prefix_tokens=prefix if isinstance(prefix, int) else None,
        output_format=str(getattr(form, "value", form)) if form else None,
    )


def _units(root: nn.Module, graphs: dict[bool, fx.Graph]) -> Iterator[Unit]:
    parts = {training: _Parts(root, graph) for training, graph in graphs.items()}
    cuts = {training: part.cuts() for training, part in parts.items()}
    ends = [name for name in cuts[True] if name in cuts[False]]
    while True:  # a parameter used on both sides of a cut ties them together
        segments = [parts[True].segment(cuts[True], start, end) for start, end in _pairs(ends)]
        used = [parts[True].parameters(segment) for segment in segments]
        tied = [end for i, end in enumerate(ends) if set().union(*used[: i + 1]) & set().union(*used[i + 1 :])]
        if not tied:
            break
        ends = [end for end in ends if end not in tied]
    code = {training: part.code(cuts[training], ends) for training, part in parts.items()}
    taken: set[str] = set()
    for i, (segment, names) in enumerate(zip(segments, used, strict=True)):
        leaves = [str(n.target) for n in segment if parts[True].is_block(n)]
        name = _common_path(leaves)
        if not name or name in taken:
            name = leaves[-1] if leaves else "output"
        taken.add(name)
        shape = parts[True].boundary(cuts[True], ends[i] if i < len(ends) else None).meta["value"].shape
        yield Unit(name, tuple(shape[1:]), tuple(names), {mode: codes[i] for mode, codes in code.items()})


def _pairs(ends: list[str]) -> Iterator[tuple[str | None, str | None]]:
    yield from zip([None, *ends], [*ends, None], strict=True)


class _Parts:
    """Where one traced graph can be cut, and the code of its parts."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.root = root
        self.image, *self.nodes, self.output = graph.nodes
        self.index = {node: i for i, node in enumerate(self.nodes)}
        # What carries the image's content, unlike sizes and what is computed from sizes alone.
        self.carries = {self.image}
        for node in self.nodes:
            if isinstance(node.meta["value"], Tensor | list | tuple) and _tensors(node.meta["value"]):
                if any(source in self.carries for source in node.all_input_nodes):
                    self.carries.add(node)
        self.last_use = {
            source: i for i, node in enumerate([*self.nodes, self.output]) for source in node.all_input_nodes
        }

    def is_block(self, node: fx.Node) -> bool:
        return node.op == "call_module" and has_matrix(self.root.get_submodule(str(node.target)))

    def cuts(self) -> dict[str, tuple[int, fx.Node]]:
        """Where to cut: name of the block before it -> (index of the last node before it, what crosses).

        Between two blocks there may be several legal places. The latest is taken, so that norms, activations and
        reshapes stay with the block before them; but none where positions are already pooled away.
        """
        blocks = [i for i, node in enumerate(self.nodes) if self.is_block(node)]
        result = {}
        for start, stop in zip(blocks, blocks[1:], strict=False):
            legal = [(i, node) for i in range(start, stop) if (node := self._crossing(i)) is not None]
            if legal:
                maps = [(i, node) for i, node in legal if node.meta["value"].ndim >= 3]
                result[str(self.nodes[start].target)] = (maps or legal)[-1]
        return result

    def _crossing(self, i: int) -> fx.Node | None:
        """The one node whose tensor is alive after node `i` and is not written in place later, if so it is."""
        alive = [n for n in self.carries if self.last_use.get(n, -1) > i and self.index.get(n, -1) <= i]
        if len(alive) != 1 or not isinstance(value := alive[0].meta["value"], Tensor):
            return None
        if alive[0] is self.image or not value.is_floating_point():
            return None
        for node in self.nodes[i + 1 :]:
            if any(_share(value, source.meta["value"]) for source in node.meta["mutated"]):
                return None
        return alive[0]

    def boundary(self, cuts: dict[str, tuple[int, fx.Node]], end: str | None) -> fx.Node:
        return cuts[end][1] if end is not None else self.output.args[0]  # type: ignore[return-value]

    def segment(self, cuts: dict[str, tuple[int, fx.Node]], start: str | None, end: str | None) -> list[fx.Node]:
        first = cuts[start][0] + 1 if start is not None else 0
        return self.nodes[first : cuts[end][0] + 1 if end is not None else None]

    def parameters(self, segment: list[fx.Node]) -> list[str]:
        """Names of the parameters that a segment uses, those of values it computes anew included."""
        result: dict[str, None] = {}
        pending = list(segment)
        for node in pending:
            if node.op == "call_module":
                for name, _ in self.root.get_submodule(str(node.target)).named_parameters():
                    result[f"{node.target}.{name}"] = None
            elif node.op == "get_attr" and isinstance(node.meta["value"], nn.Parameter):
                result[str(node.target)] = None
            pending.extend(n for n in node.all_input_nodes if n not in pending and self._recomputed(n))
        return list(result)

    def _recomputed(self, node: fx.Node) -> bool:
        """Whether each unit that needs a value computes it itself, so that gradients reach its parameters."""
        if node.op == "get_attr":
            return True
        return node not in self.carries and any(t.requires_grad for t in _tensors(node.meta["value"]))

    def code(self, cuts: dict[str, tuple[int, fx.Node]], ends: list[str]) -> list[_Code]:
        graphs, reads = [], []
        previous = self.image
        for start, end in _pairs(ends):
            graph, placeholders = self._extract(self.segment(cuts, start, end), previous)
            previous = self.boundary(cuts, end)
            graphs.append((graph, previous))
            reads.append(placeholders)
        result = []
        for i, (build, crossing) in enumerate(graphs):
            wanted = {node for later in reads[i + 1 :] for node in later}
            writes = [node for node in self.nodes if node in wanted and node in build.own]
            function = build.finish(self.root, crossing, writes)
            result.append(_Code(function, tuple(n.name for n in reads[i]), tuple(n.name for n in writes)))
        return result

    def _extract(self, segment: list[fx.Node], previous: fx.Node) -> tuple["_Build", list[fx.Node]]:
        build = _Build(segment, previous)
        own = set(segment)
        reads: dict[fx.Node, None] = {}

        def find(node: fx.Node) -> None:
            if node in own or node is previous or node in reads:
                return
            if self._recomputed(node):
                for source in node.all_input_nodes:
                    find(source)
            else:
                reads[node] = None

        for node in segment:
            for source in node.all_input_nodes:
                find(source)
        for node in reads:
            build.placeholder(node)
        for node in segment:
            build.copy(node)
        return build, list(reads)


class _Build:
    """One unit's graph while it is built."""

    def __init__(self, segment: list[fx.Node], previous: fx.Node) -> None:
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.own = set(segment)
        self.placeholder(previous)

    def placeholder(self, node: fx.Node) -> None:
        self.env[node] = self.graph.placeholder(node.name)

    def copy(self, node: fx.Node) -> fx.Node:
        if node not in self.env:
            for source in node.all_input_nodes:
                self.copy(source)
            self.env[node] = self.graph.node_copy(node, lambda source: self.env[source])
        return self.env[node]

    def finish(self, root: nn.Module, crossing: fx.Node, writes: list[fx.Node]) -> Callable[..., Any]:
        output = self.env[crossing]
        self.graph.output((output, [self.env[node] for node in writes]) if writes else output)
        # The class that GraphModule generates is wanted for its code alone: it runs with the backbone as `self`.
        return type(fx.GraphModule(root, self.graph)).forward


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in _tensors(item)] if isinstance(value, (list, tuple)) else []


def _share(a: Tensor, b: Any) -> bool:
    return isinstance(b, Tensor) and a.untyped_storage()._cdata == b.untyped_storage()._cdata


def _checkpoints(backbone: nn.Module) -> bool:
    """Whether the user has called timm's `set_grad_checkpointing`: then each unit is checkpointed."""
    return any(getattr(module, "grad_checkpointing", False) for module in backbone.modules())


def _common_path(names: list[str]) -> str:
    parts = [name.split(".") for name in names]
    common = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    return ".".join(common)


def _own_input_size(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) that a timm or torchvision model was built for."""
    conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    settings = getattr(model, "pretrained_cfg", None) or {}
    for owner in (getattr(model, "patch_embed", None), model):
        for attribute in ("img_size", "image_size"):
            side = getattr(owner, attribute, None)
            if isinstance(side, int):
                side = (side, side)
            if isinstance(side, (tuple, list)) and len(side) == 2:
                return (conv.in_channels if conv else 3, int(side[0]), int(side[1]))
    if "input_size" in settings:
        channels, height, width = settings["input_size"]
        return (conv.in_channels if conv else channels, height, width)
    if type(model).__module__.startswith("torchvision."):
        return (3, 224, 224)
    raise ChainError(
        f"{type(model).__name__} does not tell the size of its images; pass input_size=(channels, height, width)"
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
