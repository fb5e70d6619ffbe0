"""CUDA graphs: work on a GPU is captured once, and replayed without Python or a launch for each kernel."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from localprop.network.carry import Carry

Work = Callable[[Carry], None]
"""What is done with a batch at a module; afterwards the batch is ready for the next work."""


class GraphPool(Protocol):
    """Captures work as graphs that share memory."""

    def warm_up(self) -> AbstractContextManager[None]:
        """A context in which work runs eagerly, on the stream on which it will be captured."""

    def find_syncs(self) -> AbstractContextManager[list[str]]:
        """A context whose list has, after the end, the lines of code in which the host waited for the device."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Captures work without running it; returns what replays it."""


class CudaGraphPool:
    """Captures CUDA graphs that share one pool of memory: a graph uses what those captured before it have freed.

    So they may be replayed one at a time only, in the order in which they were captured. Networks that run at once need
    a pool each.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._handle = torch.cuda.graph_pool_handle()
        self._failed: list[torch.cuda.CUDAGraph] = []  # torch's allocator may ask them about later captures

    @contextmanager
    def warm_up(self) -> Iterator[None]:
        """See `GraphPool`. Libraries keep a workspace for each stream, so they make it here."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    @contextmanager
    def find_syncs(self) -> Iterator[list[str]]:
        """See `GraphPool`. A wait makes a capture fail, and leaves torch in disorder."""
        places: list[str] = []
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield places
            finally:
                torch.cuda.set_sync_debug_mode(before)
        for warning in caught:
            if "synchronizing CUDA operation" in str(warning.message):
                places.append(f"line {warning.lineno} of {Path(warning.filename).name}")

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """See `GraphPool`. Other threads may use the device meanwhile, such as one that loads data."""
        graph = torch.cuda.CUDAGraph()
        problem: Exception | None = None
        # The outer context returns to the caller's stream: torch does so only after a capture that ended.
        with torch.cuda.stream(self._stream):
            try:
                with self._capturing(graph, pool=self._handle):
                    try:
                        work()
                    except Exception as error:
                        problem = error
            except Exception as error:
                problem = problem or error  # ending a broken capture fails too, and says less than what broke it
            if problem:
                self._recover(graph)
        if problem is None:
            return graph.replay
        try:
            raise problem
        finally:
            del problem  # else it would keep itself, and the tensors of its frames, until garbage is collected

    def _capturing(self, graph: torch.cuda.CUDAGraph, **options: Any) -> AbstractContextManager[None]:
        return torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local", **options)

    def _recover(self, graph: torch.cuda.CUDAGraph) -> None:
        """Ends what a failed capture may have begun, and gives its memory back."""
        with suppress(RuntimeError):  # where torch has done it
            torch._C._cuda_endAllocateToPool(self._stream.device.index, self._handle)
            torch._C._cuda_releasePool(self._stream.device.index, self._handle)
        graph.reset()
        self._failed.append(graph)
        self._handle = torch.cuda.graph_pool_handle()  # a pool that has lost its graphs cannot be used again
        # Generators stay in a failed capture until another one succeeds.
        with suppress(RuntimeError), self._capturing(torch.cuda.CUDAGraph()):
            torch.zeros(1, device=self._device)


class CapturedPass:
    """A pass of a batch through some modules, one graph for each: captured once, replayed for every later batch.

    Each work draws its random numbers from a seed that is set before it.

    Args:
        pool: captures the graphs; passes that share memory have one pool.
        works: what is done with a batch, in order.
        seed: called before each work is replayed, with its number and the seed of the batch.
        after_capture: called after each work has been captured, with its number.
        after_replay: called after each work has been replayed, with its number and the batch: what the host does.
    """

    def __init__(
        self,
        pool: GraphPool,
        works: Sequence[Work],
        seed: Callable[[int, int], None],
        after_capture: Callable[[int], None] = lambda number: None,
        after_replay: Callable[[int, Carry], None] = lambda number, carry: None,
    ) -> None:
        self._pool, self._works, self._seed = pool, works, seed
        self._after_capture, self._after_replay = after_capture, after_replay
        self._graphs: list[Callable[[], None]] = []

    def capture(self, carry: Carry) -> None:
        """Captures every work for batches like `carry`, whose features and inputs it moves to the host."""
        self._form = form(carry)
        device, shared = carry.features.device, carry.inputs is carry.features
        like = [None if tensor is None else torch.empty_like(tensor, device="meta") for tensor in _large(carry)]
        share = None if carry.share is None else carry.share.clone()
        own = replace(carry, targets=carry.targets.clone(), share=share, context=copy_of_context(carry.context))
        own.losses, own.sums = [], []
        self._small = [own.targets, own.share, *_context(own)]  # which every module may read
        _move(carry, torch.device("cpu"))  # else the device would hold the batch twice while memory is measured

        def begin(work: Work) -> None:
            # In the graphs' memory, so that later modules can use it when the first no longer needs it.
            features, inputs = (None if t is None else torch.empty_like(t, device=device) for t in like)
            assert features is not None
            own.features, own.inputs = features, features if shared else inputs
            self._buffers = [None if t is None else borrowed(t) for t in (features, inputs, *self._small)]
            del features, inputs
            work(own)

        graphs = []
        try:
            for number, work in enumerate(self._works):
                start = partial(begin, work) if number == 0 else partial(work, own)
                graphs.append(self._pool.capture(start))
                self._after_capture(number)
        except Exception:
            _move(carry, device)
            raise
        self._output, self._graphs = own, graphs

    def fits(self, carry: Carry) -> bool:
        """Whether a batch has the form that was captured."""
        return form(carry) == self._form

    def replay(self, carry: Carry, seed: int | None) -> None:
        """Replays every work on a batch, which then has the graphs' outputs: the next replay overwrites them."""
        given = [*_large(carry), carry.targets, carry.share, *_context(carry)]
        for buffer, tensor in zip(self._buffers, given, strict=True):
            if buffer is not None and tensor is not None:
                buffer.copy_(tensor, non_blocking=True)
        del given
        output = self._output
        # Frees the batch's own memory.
        carry.features, carry.inputs, carry.context = output.features, output.inputs, dict(output.context)
        for number, start in enumerate(self._graphs):
            if seed is not None:
                self._seed(number, seed)
            start()
            self._after_replay(number, output)
        carry.losses.extend(output.losses)


def form(carry: Carry) -> tuple[Any, ...]:
    """What captured work depends on besides the numbers in a batch's tensors."""
    tensors = [*_large(carry), carry.targets, carry.share, *_context(carry)]
    forms = [None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors]
    others = tree_map_only(Tensor, lambda tensor: None, carry.context)
    return forms, repr(sorted(others.items())), carry.inputs is carry.features


def borrowed(tensor: Tensor) -> Tensor:
    """A tensor in the same memory that does not own it: the allocator may give that memory out again."""
    storage = tensor.untyped_storage()
    place = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), tensor.device, storage.nbytes())
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(place, tensor.storage_offset(), tensor.size(), tensor.stride())


def copy_of_context(context: dict[str, Any]) -> dict[str, Any]:
    """The same with tensors of its own."""
    return tree_map_only(Tensor, Tensor.clone, context)


def _large(carry: Carry) -> list[Tensor | None]:
    """Features and inputs; no inputs where they are the features."""
    return [carry.features, None if carry.inputs is carry.features else carry.inputs]


def _context(carry: Carry) -> list[Tensor]:
    leaves = tree_leaves([value for _, value in sorted(carry.context.items())])
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _move(carry: Carry, device: torch.device) -> None:
    """Moves a batch's features and inputs, which frees their memory where they were."""
    shared = carry.inputs is carry.features
    carry.features = carry.features.to(device, copy=True)
    if shared:
        carry.inputs = carry.features
    elif carry.inputs is not None:
        carry.inputs = carry.inputs.to(device, copy=True)
