"""A model's forward in train mode and in eval mode, which are cut at the same places."""

import logging
from collections.abc import Iterator, Set
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from localprop.errors import ChainError
from localprop.tracing.copies import fake_copy
from localprop.tracing.cuts import Cut, Forward, Segment
from localprop.tracing.reasons import why_no_chain
from localprop.tracing.tracer import trace

_MODES = {True: "train", False: "eval"}
_TIED = "parameters are used both up to {} and after it; give each side its own, if that may be"


class BothModes:
    """A traced forward in both modes, by whether the mode is that of training.

    Args:
        forwards: the traced forwards.

    Attributes:
        forwards: likewise.
        segments: between the cuts that both modes allow.
        blocks: names of the blocks in each segment.
        whole: why parts are called as they are, by their name.
    """

    def __init__(self, forwards: dict[bool, Forward]) -> None:
        self.forwards = forwards
        self._cuts = {training: forward.cuts() for training, forward in forwards.items()}
        ends = [name for name in self._cuts[True] if name in self._cuts[False]]
        for training, forward in forwards.items():
            ends = _untied(forward, self._cuts[training], ends)
        self.segments: dict[bool, list[Segment]] = {
            t: forward.split([self._cuts[t][end] for end in ends]) for t, forward in forwards.items()
        }
        is_block = forwards[True].is_block
        self.blocks = [[str(node.target) for node in own.nodes if is_block(node)] for own in self.segments[True]]
        self.whole: dict[str, str] = {}
        for training, mode in _MODES.items():
            for name, why in forwards[training].whole.items():
                only = "" if name in forwards[not training].whole else f" (in {mode} mode)"
                self.whole.setdefault(name, why + only)

    def obstacle(self, part: str, blocks: list[str]) -> str | None:
        """Why there is no cut after the first of consecutive blocks that another follows; None for a single block.

        Args:
            part: what has the blocks; their names in the answer are those within it.
            blocks: their names.
        """
        for name, after in pairwise(blocks):
            why = self._obstacle_after(name) or (_TIED.format(name) if name != after else None)
            if why:
                return why.replace(f"{part}.", "")
        return None

    def _obstacle_after(self, name: str) -> str | None:
        for training, mode in _MODES.items():
            forward = self.forwards[training]
            if name not in self._cuts[training]:
                if outer := next((part for part in forward.whole if name.startswith(f"{part}.")), None):
                    return f"{outer} stays whole in {mode} mode"
                only = "" if name not in self._cuts[not training] else f" (in {mode} mode)"
                return forward.obstacle(name) + only
        return None


def trace_modes(model: nn.Module, size: tuple[int, int, int], opened: Set[str]) -> BothModes:
    """The forward in train mode (True) and in eval mode (False), traced with the blocks `opened` opened."""
    which = f"cannot cut {type(model).__name__} for images of {'x'.join(map(str, size))}"
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    try:
        with no_logging("torch._subclasses.fake_tensor"):
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
    return BothModes({training: Forward(duplicate, *traced) for training, traced in traces.items()})


def _untied(forward: Forward, cuts: dict[str, Cut], ends: list[str]) -> list[str]:
    """The ends left when no parameter may be used on both sides of a cut."""
    used = [set(forward.parameters(segment)) for segment in forward.split([cuts[end] for end in ends])]
    return [end for i, end in enumerate(ends, 1) if set().union(*used[:i]).isdisjoint(set().union(*used[i:]))]


@contextmanager
def no_logging(name: str) -> Iterator[None]:
    """Silences a logger: torch logs each error on fake tensors with its traceback, even one that is handled."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
