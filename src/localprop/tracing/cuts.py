"""Where a traced forward can be cut, and the code of the parts."""

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor, fx, nn

from localprop.errors import listing
from localprop.tracing.blocks import has_matrix
from localprop.tracing.code import Code, Handed
from localprop.tracing.copies import tensors_of
from localprop.tracing.proxies import BATCHES


class Cut(NamedTuple):
    """A place between two nodes where exactly one tensor crosses that carries a gradient."""

    place: int  # index of the first node after it
    crossing: fx.Node


class Segment(NamedTuple):
    """The nodes between two cuts."""

    source: fx.Node
    nodes: list[fx.Node]
    result: fx.Node


class Forward:
    """A traced forward in one mode (train or eval).

    Three kinds of nodes are told apart. What *carries* depends on the image and requires a gradient: one such
    tensor may cross a cut. What requires a gradient but not from the image (a position bias made of parameters)
    each segment computes *anew*, so that gradients reach those parameters. The rest (sizes, rotary tables, masks)
    is handed along: no gradient flows through it.

    Args:
        root: the model.
        graph: of its forward.
        whole: why parts of it are called as they are, by their name; as of `localprop.tracing.tracer.trace`.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, whole: dict[str, str]) -> None:
        self.root = root
        self.whole = whole
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
        self._of_pixels = {self.image}  # tensors that depend on more of the image than its size
        for node in nodes:
            if tensors_of(node.meta["value"]) and not self._of_pixels.isdisjoint(node.all_input_nodes):
                self._of_pixels.add(node)
        self._anew = {n for n in nodes if n.op == "get_attr" or _requires_grad(n)} - self._carrying
        self.nodes = [node for node in nodes if node not in self._anew]

    def is_block(self, node: fx.Node) -> bool:
        """Whether a node calls a module that holds a matrix."""
        return node.op == "call_module" and has_matrix(self.root.get_submodule(str(node.target)))

    def cuts(self) -> dict[str, Cut]:
        """Where to cut, by the name of the block before it.

        Between two blocks there may be several legal places. The latest is taken, so that norms, activations and
        reshapes stay with the block before them; but none where positions are already pooled away. A cut between
        opened blocks is in neither; one inside a block is where the tensor has a row for each image and its map is not
        flattened.
        """
        crossings = self._crossings()
        opened = [node.meta["block"] for node in self.nodes]
        result: dict[str, Cut] = {}
        for start, stop in self._gaps():
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

    def _gaps(self) -> Iterable[tuple[int, int]]:
        """The places of each block and of the next."""
        return pairwise(i for i, node in enumerate(self.nodes) if self.is_block(node))

    def obstacle(self, name: str) -> str:
        """Why there is no cut after the block `name`, though another follows."""
        start, stop = next((i, j) for i, j in self._gaps() if self.nodes[i].target == name)
        alive = min(self._alive()[start + 1 : stop + 1], key=len)
        if len(alive) > 1:
            makers = list(dict.fromkeys(self._maker(node) for node in sorted(alive, key=self._rank)))
            return f"{len(alive)} tensors cross after {name}, made by {listing(makers)}; a cut needs a single one"
        return f"after {name} no tensor crosses alone that has a row per image and is not written to later"

    def _rank(self, node: fx.Node) -> int:
        return self._order.get(node, -1)

    def _maker(self, node: fx.Node) -> str:
        """The last module that worked on what a node gives; "the image" if none did."""
        while node.op != "call_module":
            sources = [source for source in node.all_input_nodes if source in self._carrying]
            if not sources:
                return "the image"
            node = max(sources, key=self._rank)
        return str(node.target)

    def _crossings(self) -> dict[int, fx.Node]:
        """The one carrying tensor alive before node `i`, for each `i` where there is just one that may be cut at."""
        written = {n: i for i, node in enumerate(self.nodes) for n in node.meta["mutated"]}
        result: dict[int, fx.Node] = {}
        for i, alive in enumerate(self._alive()):
            if len(alive) == 1:
                (crossing,) = alive
                later = [n for n, at in written.items() if at >= i]
                if crossing is not self.image and not any(_share_memory(crossing, n) for n in later):
                    result[i] = crossing
        return {i: n for i, n in result.items() if isinstance(n.meta["value"], Tensor)}

    def _alive(self) -> list[set[fx.Node]]:
        """The carrying tensors that are alive before each node."""
        last_use = {s: i for i, node in enumerate(self.nodes) for s in node.all_input_nodes}
        last_use[self.result] = len(self.nodes)
        result = []
        alive = {self.image}
        for i, node in enumerate(self.nodes):
            alive = {n for n in alive if last_use.get(n, -1) >= i}
            result.append(alive)
            alive = alive | {node} if node in self._carrying else alive
        return result

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
        """Names of the modules that a segment calls, and of the tensors that it reads from the backbone itself."""
        nodes = self._needs(segment)[0]
        kinds = ("call_module", "get_attr")
        modules, tensors = (list(dict.fromkeys(str(n.target) for n in nodes if n.op == kind)) for kind in kinds)
        return modules, tensors

    def compile(self, segments: list[Segment]) -> list[Code]:
        """Generates the code of consecutive segments."""
        needs = [self._needs(segment) for segment in segments]
        result = []
        for i, (segment, (nodes, reads)) in enumerate(zip(segments, needs, strict=True)):
            read_later = {node for _, later in needs[i + 1 :] for node in later}
            writes = [node for node in segment.nodes if node in read_later]
            graph = _graph([segment.source, *reads], nodes, segment.result, writes)
            code = graph.python_code("self")
            read, written = (tuple(node.name for node in group) for group in (reads, writes))
            handed = {node.name: self._handed(node) for node in (*reads, *writes)}
            result.append(Code.generate(code.src, code.globals, read, written, handed))
        return result

    def _handed(self, node: fx.Node) -> Handed:
        """How a value that is handed along depends on the batch."""
        values = [node.meta[key] for key in BATCHES]
        tensors = [tensors_of(value) for value in values]
        if isinstance(values[0], Tensor) and _is_per_image(node):
            return "rows"
        if tensors[0]:
            shapes = [[tensor.shape for tensor in own] for own in tensors]
            return "same" if shapes[0] == shapes[1] and node not in self._of_pixels else "mixed"
        if values[0] == values[1]:
            return "same"
        whole = all(type(value) is int for value in values)
        small, large = BATCHES.values()
        return "count" if whole and values[0] * large == values[1] * small else "mixed"

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
    """Moves nodes that give sizes right after the tensor they look at, so that it need not stay alive for them."""
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
