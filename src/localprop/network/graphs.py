"""Work on a GPU as CUDA graphs: recorded once, then started as a whole, without Python or a launch for each kernel."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from localprop.network.carry import Carry

Work = Callable[[Carry], None]
"""What is done on a batch as it comes to a module; it leaves the batch as the next work takes it."""


class Recorder(Protocol):
    """Where work is recorded."""

    def apart(self) -> Any:
        """A context in which work runs as usual, in the place where it will be recorded."""

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

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Inside, work runs on the stream that graphs are recorded on: libraries keep their workspaces by stream."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """See `Recorder`. Other threads may use the device meanwhile, such as one that loads data."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay


class CapturedPass:
    """A batch's way through some modules, as one graph for each: recorded once, replayed for every later batch.

    Batches are copied into buffers of its own. Each work gets its random numbers from a seed that is set before it.

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
        """Records every work on buffers that take batches like `carry`, whose tensors are replaced by these."""
        self._form = form(carry)
        self._buffers = _copy(carry)
        _hand_over(carry, self._buffers)
        own = replace(self._buffers, losses=[], sums=[], context=dict(self._buffers.context))
        graphs = []
        for number, work in enumerate(self._works):
            graphs.append(self._recorder.record(lambda work=work: work(own)))  # type: ignore[misc]
            self._recorded(number)
        self._output, self._graphs = own, graphs

    def fits(self, carry: Carry) -> bool:
        """Whether a batch has the form that was recorded."""
        return form(carry) == self._form

    def replay(self, carry: Carry, seed: int | None) -> None:
        """Does every work on a batch, which then has the recorded outputs: the next replay writes over them."""
        for buffer, tensor in zip(_tensors(self._buffers), _tensors(carry), strict=True):
            if buffer is not tensor:
                buffer.copy_(tensor, non_blocking=True)
        _hand_over(carry, self._buffers)
        output = self._output
        for number, start in enumerate(self._graphs):
            if seed is not None:
                self._seed(number, seed)
            start()
            self._after(number, output)
        carry.features, carry.inputs, carry.context = output.features, output.inputs, dict(output.context)
        carry.losses.extend(output.losses)


def form(carry: Carry) -> tuple[Any, ...]:
    """What recorded work depends on, beside the numbers in a batch's tensors."""
    tensors = [(tensor.shape, tensor.dtype, tensor.device) for tensor in _tensors(carry)]
    others = tree_map_only(Tensor, lambda tensor: None, carry.context)
    shared = carry.inputs is carry.features, carry.inputs is None, carry.share is None
    return tensors, repr(sorted(others.items())), shared


def _tensors(carry: Carry) -> list[Tensor]:
    inputs = None if carry.inputs is carry.features else carry.inputs
    context = [value for _, value in sorted(carry.context.items())]
    leaves = tree_leaves([carry.features, carry.targets, inputs, carry.share, context])
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _copy(carry: Carry) -> Carry:
    """The same with tensors of its own."""
    share = None if carry.share is None else carry.share.clone()
    return replace(carry.clone(), share=share, context=copy_of_context(carry.context))


def _hand_over(carry: Carry, buffers: Carry) -> None:
    """Puts the buffers in the place of a batch's tensors, whose memory is free then."""
    carry.features, carry.targets, carry.inputs = buffers.features, buffers.targets, buffers.inputs
    carry.share, carry.context = buffers.share, dict(buffers.context)


def copy_of_context(context: dict[str, Any]) -> dict[str, Any]:
    """The same with tensors of its own."""
    return tree_map_only(Tensor, Tensor.clone, context)
