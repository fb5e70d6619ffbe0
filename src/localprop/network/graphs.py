"""Work on a GPU as CUDA graphs: recorded once, then started as a whole, without Python or a launch for each kernel."""

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
"""What is done on a batch as it comes to a module; it leaves the batch as the next work takes it."""


class Recorder(Protocol):
    """Where work is recorded."""

    def apart(self) -> AbstractContextManager[None]:
        """A context in which work runs as usual, in the place where it will be recorded."""

    def watched(self) -> AbstractContextManager[list[str]]:
        """A context that gives a list of the lines of code in which the host waits for the device, after the end."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Records work without doing it; gives what does it."""


class CudaRecorder:
    """Records graphs that share one pool of memory: what one has freed, those recorded later use.

    So they may only run in the order in which they were recorded, one at a time: networks that run at once need a
    recorder each.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._failed: list[torch.cuda.CUDAGraph] = []  # torch's allocator may ask them about later recordings

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Inside, work runs on the stream that graphs are recorded on: libraries keep their workspaces by stream."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    @contextmanager
    def watched(self) -> Iterator[list[str]]:
        """See `Recorder`. Waiting makes a recording fail, after which torch would not be in order."""
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

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """See `Recorder`. Other threads may use the device meanwhile, such as one that loads data."""
        graph = torch.cuda.CUDAGraph()
        problem: Exception | None = None
        # The outer context is the way back to the caller's stream: torch takes it only after a recording that ended.
        with torch.cuda.stream(self._stream):
            try:
                with self._recording(graph, pool=self._pool):
                    try:
                        work()
                    except Exception as error:
                        problem = error
            except Exception as error:
                problem = problem or error  # ending a broken recording fails too, and says less than what broke it
            if problem:
                self._recover(graph)
        if problem is None:
            return graph.replay
        try:
            raise problem
        finally:
            del problem  # else it would keep itself, and the tensors of its frames, until garbage is collected

    def _recording(self, graph: torch.cuda.CUDAGraph, **options: Any) -> AbstractContextManager[None]:
        return torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local", **options)

    def _recover(self, graph: torch.cuda.CUDAGraph) -> None:
        """Ends what a failed recording may have begun, and gives its memory back."""
        with suppress(RuntimeError):  # where torch has done it
            torch._C._cuda_endAllocateToPool(self._stream.device.index, self._pool)
            torch._C._cuda_releasePool(self._stream.device.index, self._pool)
        graph.reset()
        self._failed.append(graph)
        self._pool = torch.cuda.graph_pool_handle()  # one without graphs cannot be shared any more
        # Generators stay in a failed recording until another one ends well.
        with suppress(RuntimeError), self._recording(torch.cuda.CUDAGraph()):
            torch.zeros(1, device=self._device)


class CapturedPass:
    """A batch's way through some modules, as one graph for each: recorded once, replayed for every later batch.

    Each work gets its random numbers from a seed that is set before it.

    Args:
        recorder: what records; one for all passes that share memory.
        works: what is done, in order.
        seed: called before the work of a number, with the seed of the batch.
        recorded: called after the work of a number has been recorded.
        after: called after the work of a number has run, with the batch: what is done by the host.
    """

    def __init__(
        self,
        recorder: Recorder,
        works: Sequence[Work],
        seed: Callable[[int, int], None],
        recorded: Callable[[int], None] = lambda number: None,
        after: Callable[[int, Carry], None] = lambda number, carry: None,
    ) -> None:
        self._recorder, self._works, self._seed = recorder, works, seed
        self._recorded, self._after = recorded, after
        self._graphs: list[Callable[[], None]] = []

    def record(self, carry: Carry) -> None:
        """Records every work for batches like `carry`, whose features and inputs are on the host afterwards."""
        self._form = form(carry)
        device, shared = carry.features.device, carry.inputs is carry.features
        like = [None if tensor is None else torch.empty_like(tensor, device="meta") for tensor in _large(carry)]
        share = None if carry.share is None else carry.share.clone()
        own = replace(carry, targets=carry.targets.clone(), share=share, context=copy_of_context(carry.context))
        own.losses, own.sums = [], []
        self._small = [own.targets, own.share, *_context(own)]  # which every module may look at
        _move(carry, torch.device("cpu"))  # or else the batch would be there twice while memory is measured

        def begin(work: Work) -> None:
            # In the memory of the graphs, so that later modules get it once the first does not need it any more.
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
                graphs.append(self._recorder.record(start))
                self._recorded(number)
        except Exception:
            _move(carry, device)
            raise
        self._output, self._graphs = own, graphs

    def fits(self, carry: Carry) -> bool:
        """Whether a batch has the form that was recorded."""
        return form(carry) == self._form

    def replay(self, carry: Carry, seed: int | None) -> None:
        """Does every work on a batch, which then has the recorded outputs: the next replay writes over them."""
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
            self._after(number, output)
        carry.losses.extend(output.losses)


def form(carry: Carry) -> tuple[Any, ...]:
    """What recorded work depends on, beside the numbers in a batch's tensors."""
    tensors = [*_large(carry), carry.targets, carry.share, *_context(carry)]
    forms = [None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors]
    others = tree_map_only(Tensor, lambda tensor: None, carry.context)
    return forms, repr(sorted(others.items())), carry.inputs is carry.features


def borrowed(tensor: Tensor) -> Tensor:
    """The same memory, which its allocator may give out again meanwhile."""
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
