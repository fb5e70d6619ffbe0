"""Where a traced forward can be cut, and the code of the parts."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from localprop.tracing.blocks import has_matrix
from localprop.tracing.tracer import BATCHES, tensors_of


class Cut(NamedTuple):
    """A place between two nodes where exactly one tensor crosses that carries a gradient."""

    place: int  # index of the first node after it
    crossing: fx.Node


class Segment(NamedTuple):
    """The nodes between two cuts."""

    source: fx.Node
    nodes: list[fx.Node]
    result: fx.Node


@dataclass(frozen=True)
class Code:
    """The generated code of one segment.

    Attributes:
        function: (backbone, features, *values read) -> output, or (output, values written).
        reads: names of the values that earlier segments hand along.
        writes: names of the values that it hands along.
        source: of the function.
        scope: what names in it stand for.
    """

    function: Callable[..., Any]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    source: str = field(default="", repr=False)
    scope: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def generate(cls, source: str, scope: dict[str, Any], reads: tuple[str, ...], writes: tuple[str, ...]) -> "Code":
        """Code from the source of a function called `forward`, and what its names stand for."""
        names = dict(scope)
        exec(source, names)
        return cls(names["forward"], reads, writes, source, scope)

    def __reduce__(self) -> tuple[Any, ...]:
        # A generated function cannot be pickled, but generated again. Modules such as torch are imported again.
        scope = {name: _Module(v.__name__) if isinstance(v, ModuleType) else v for name, v in self.scope.items()}
        return _regenerate, (self.source, scope, self.reads, self.writes)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Code":
        return self  # it holds no tensors


class _Module(NamedTuple):
    """Stands for a Python module in a pickle."""

    name: str


def _regenerate(source: str, scope: dict[str, Any], reads: tuple[str, ...], writes: tuple[str, ...]) -> Code:
    whole = {name: import_module(v.name) if isinstance(v, _Module) else v for name, v in scope.items()}
    return Code.generate(source, whole, reads, writes)


class Forward:
    """A traced forward in one mode (train or eval).

    Three kinds of nodes are told apart. What *carries* depends on the image and requires a gradient: one such
    tensor may cross a cut. What requires a gradient but not from the image (a position bias made of parameters)
    each segment computes *anew*, so that gradients reach those parameters. The rest (sizes, rotary tables, masks)
    is handed along: no gradient flows through it.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.root = root
        self.image, *nodes, output = graph.nodes
        self.result: fx.Node = output.args[0]
        nodes = _sizes_first(nodes)
        self._order = {node: i for i, node in enumerate(nodes)}
        self._parameter_names = {id(p): name for name, p in root.named_parameters()}
        self._buffer_names = {id(b): name for name, b in root.named_buffers()}
        self._carrying = {self.image}
        for node in nodes:
            if _requires_grad(node) and not self._carrying.isdisjoint(node.all_input_nodes):
                self._carrying.add(node)
        self._anew = {n for n in nodes if n.op == "get_attr" or _requires_grad(n)} - self._carrying
        self.nodes = [node for node in nodes if node not in self._anew]

    def is_block(self, node: fx.Node) -> bool:
        """Whether a node calls a module that holds a matrix."""
        return node.op == "call_module" and has_matrix(self.root.get_submodule(str(node.target)))

    def cuts(self) -> dict[str, Cut]:
        """Where to cut, by the name of the block before it.

        Between two blocks there may be several legal places. The latest is taken, so that norms, activations and
        reshapes stay with the block before them; but none where positions are already pooled away. A cut between
        opened blocks lies in neither; one inside a block lies where the tensor has a row per image, and its map is
        not flattened.
        """
        crossings = self._crossings()
        blocks = [i for i, node in enumerate(self.nodes) if self.is_block(node)]
        opened = [node.meta["block"] for node in self.nodes]
        result: dict[str, Cut] = {}
        for start, stop in pairwise(blocks):
            ends, begins = opened[start], opened[stop]
            legal = [Cut(i, crossings[i]) for i in range(start + 1, stop + 1) if i in crossings]
            inside = begins is not None and begins == ends
            if inside:
                legal = [cut for cut in legal if _is_per_image(cut.crossing)]
            else:
                legal = [c for c in legal if opened[c.place - 1] in (None, ends) and opened[c.place] in (None, begins)]
            if legal:
                axes = [cut.crossing.meta["value"].ndim for cut in legal]
                enough = max(axes) if inside else min(max(axes), 3)
                name = str(self.nodes[start].target)
                result.pop(name, None)  # a block that is called twice counts where it is called last
                result[name] = [cut for cut, count in zip(legal, axes, strict=True) if count >= enough][-1]
        return result

    def _crossings(self) -> dict[int, fx.Node]:
        """The one carrying tensor alive before node `i`, for each `i` where there is just one."""
        last_use = {s: i for i, node in enumerate(self.nodes) for s in node.all_input_nodes}
        last_use[self.result] = len(self.nodes)
        mutated = {n: i for i, node in enumerate(self.nodes) for n in node.meta["mutated"]}
        result: dict[int, fx.Node] = {}
        alive = {self.image}
        for i, node in enumerate(self.nodes):
            alive = {n for n in alive if last_use.get(n, -1) >= i}
            if len(alive) == 1:
                (crossing,) = alive
                later = [n for n, at in mutated.items() if at >= i]
                if crossing is not self.image and not any(_share_memory(crossing, n) for n in later):
                    result[i] = crossing
            if node in self._carrying:
                alive.add(node)
        return {i: n for i, n in result.items() if isinstance(n.meta["value"], Tensor)}

    def split(self, cuts: Iterable[Cut]) -> list[Segment]:
        """The segments between `cuts`, which are in order."""
        segments, start, source = [], 0, self.image
        for index, crossing in [*cuts, Cut(len(self.nodes), self.result)]:
            segments.append(Segment(source, self.nodes[start:index], crossing))
            start, source = index, crossing
        return segments

    def parameters(self, segment: Segment) -> list[str]:
        """Names of the parameters that a segment uses, those of values it computes anew included.

        A parameter with several names in the model has the first of them here.
        """
        return self._used(segment, self._parameter_names, nn.Module.parameters)

    def buffers(self, segment: Segment) -> list[str]:
        """Names of the buffers that a segment uses; see `parameters`."""
        return self._used(segment, self._buffer_names, nn.Module.buffers)

    def _used(
        self, segment: Segment, names: dict[int, str], members: Callable[[nn.Module], Iterable[Tensor]]
    ) -> list[str]:
        result: dict[str, None] = {}
        for node in self._needs(segment)[0]:
            owner = self.root.get_submodule(str(node.target)) if node.op == "call_module" else None
            for tensor in members(owner) if owner else [node.meta["value"]]:
                if name := names.get(id(tensor)):
                    result[name] = None
        return list(result)

    def uses(self, segment: Segment) -> tuple[list[str], list[str]]:
        """Names of the modules that a segment calls, and of the tensors that it takes from the backbone itself."""
        nodes = self._needs(segment)[0]
        kinds = ("call_module", "get_attr")
        modules, tensors = (list(dict.fromkeys(str(n.target) for n in nodes if n.op == kind)) for kind in kinds)
        return modules, tensors

    def compile(self, segments: list[Segment]) -> list[Code]:
        """Generates the code of consecutive segments."""
        needs = [self._needs(segment) for segment in segments]
        result = []
        for i, (segment, (nodes, reads)) in enumerate(zip(segments, needs, strict=True)):
            wanted = {node for _, later in needs[i + 1 :] for node in later}
            writes = [node for node in segment.nodes if node in wanted]
            graph = _graph([segment.source, *reads], nodes, segment.result, writes)
            code = graph.python_code("self")
            names = (tuple(node.name for node in group) for group in (reads, writes))
            result.append(Code.generate(code.src, code.globals, *names))
        return result

    def _needs(self, segment: Segment) -> tuple[list[fx.Node], list[fx.Node]]:
        """The nodes to run for a segment, those computed anew included, and the values handed along to it."""
        run, reads = set(segment.nodes), set()
        pending = [source for node in segment.nodes for source in node.all_input_nodes]
        while pending:
            node = pending.pop()
            if node in self._anew and node not in run:
                run.add(node)
                pending.extend(node.all_input_nodes)
            elif node not in run and node is not segment.source:
                reads.add(node)
        return sorted(run, key=self._order.__getitem__), sorted(reads, key=self._order.__getitem__)


def _graph(inputs: list[fx.Node], nodes: list[fx.Node], result: fx.Node, writes: list[fx.Node]) -> fx.Graph:
    """The graph of a function of the backbone and `inputs` that runs `nodes`."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output((copies[result], [copies[node] for node in writes]) if writes else copies[result])
    return graph


def _sizes_first(nodes: list[fx.Node]) -> list[fx.Node]:
    """Moves nodes that give sizes right behind the tensor they look at, so that it need not stay alive for them."""
    rank: dict[fx.Node, int] = {}
    mutated = {n for node in nodes for n in node.meta["mutated"]}
    for i, node in enumerate(nodes):
        sources = node.all_input_nodes
        movable = sources and not tensors_of(node.meta["value"]) and mutated.isdisjoint(sources)
        rank[node] = max(rank.get(source, -1) for source in sources) if movable else i
    return sorted(nodes, key=rank.__getitem__)


def _is_per_image(node: fx.Node) -> bool:
    """Whether the first axis of a node's tensor is the batch: a local loss compares its rows with labels."""
    return all(node.meta[key].shape[:1] == (size,) for key, size in BATCHES.items())


def _requires_grad(node: fx.Node) -> bool:
    return any(tensor.requires_grad for tensor in tensors_of(node.meta["value"]))


def _share_memory(a: fx.Node, b: fx.Node) -> bool:
    storages = [{t.untyped_storage()._cdata for t in tensors_of(n.meta["value"])} for n in (a, b)]
    return not storages[0].isdisjoint(storages[1])
