"""Runs a unit on slices of the batch, one after another, in forward and again in backward.

Every image of a unit is on its own, unless batch norm or the like mixes them. So a unit may run on equal slices of the
batch, each checkpointed by itself: what backward needs of a slice exists only while that slice is at work. This lowers
the floor that a single unit, such as the MLP of a first stage, sets to the memory of a network. The output of all
slices is written into one tensor, and so is the gradient of the input. Gradients of weights add up over the slices, so
they are equal to those of one piece up to rounding; dropout draws other numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from localprop.errors import ConfigError, counted, first_line
from localprop.settings.recipe import Recomputation, runs_again
from localprop.tracing.private import private_units, writers
from localprop.tracing.units import Chain, Unit

_IMAGES = 2


def run(
    unit: Unit, backbone: nn.Module, features: Tensor, context: dict[str, Any], recomputation: Recomputation
) -> Tensor:
    """Runs a unit, which runs again in backward if `recomputation` says so: as a whole or in slices.

    Args:
        unit: the unit.
        backbone: see `Unit.__call__`, as the next two.
        features: likewise.
        context: likewise.
        recomputation: what it computes again in backward.

    Raises:
        ConfigError: the batch does not make so many equal slices.
    """
    count = runs_again(recomputation)
    if count < 2 or not (backbone.training and torch.is_grad_enabled()):
        return unit(backbone, features, context, count == 1)
    return _in_slices(unit, backbone, features, context, count)


def slice_size(name: str, images: int, count: int) -> int:
    """How many images a slice has.

    Args:
        name: of the unit that runs in slices.
        images: in the batch, or micro-batch.
        count: number of slices.

    Raises:
        ConfigError: the images do not make so many equal slices.
    """
    if images % count:
        near = max(n for n in range(1, min(count, images) + 1) if images % n == 0)
        other = f"whole/{near}" if near > 1 else "whole"
        raise ConfigError(
            f"unit {name} is to run in {count} slices, and a batch, or micro-batch, has {counted(images, 'image')}, "
            f"which {count} does not divide; take {other} for it"
        )
    return images // count


@torch._dynamo.disable  # a compiler would make one graph of all slices, and keep what it likes of them
def _in_slices(unit: Unit, backbone: nn.Module, features: Tensor, context: dict[str, Any], count: int) -> Tensor:
    code, size = unit.code[True], slice_size(unit.name, len(features), count)
    shared, ends, rows = _Shared(count, size), list[Tensor](), dict[str, list[Tensor]]()
    with _casts_apart():
        for number in range(count):
            own = {name: _sliced(context[name], code.handed[name], number, size, count) for name in code.reads}
            output = unit(backbone, _Take.apply(features, shared, number), own, True)
            ends.append(_Place.apply(output, shared, number))
            del output
            for name in code.writes:
                if code.handed[name] == "rows":
                    rows.setdefault(name, []).append(own[name])
                else:
                    context[name] = own[name] * count if code.handed[name] == "count" else own[name]
    context.update((name, torch.cat(tensors)) for name, tensors in rows.items())
    return _Join.apply(shared, *ends)


def _sliced(value: Any, kind: str, number: int, size: int, count: int) -> Any:
    """A value that is handed along to a unit, for one slice."""
    if kind == "rows":
        return value.narrow(0, number * size, size)
    return value // count if kind == "count" else value


@contextmanager
def _casts_apart() -> Iterator[None]:
    """Inside, autocast casts a weight for each slice anew: or their gradients would be added in half precision."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class _Shared:
    """What the slices of a unit share.

    Attributes:
        count: number of slices.
        size: images in each.
        output: into which forward writes the output of each slice.
        gradient: of the output, while backward is at work on the slices.
        to_input: into which backward writes the gradient of the input.
    """

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self.output: Tensor | None = None
        self.gradient: Tensor | None = None
        self.to_input: Tensor | None = None
        self._done = {"output": 0, "input": 0}

    def rows(self, tensor: Tensor, number: int) -> Tensor:
        """Those of a slice."""
        return tensor.narrow(0, number * self.size, self.size)

    def buffer(self, like: Tensor) -> Tensor:
        """A tensor for all slices, laid out in memory as `like` is for one."""
        image, shape = like[0], (self.count * self.size, *like.shape[1:])
        dense = sum((n - 1) * step for n, step in zip(image.shape, image.stride(), strict=True)) + 1 == image.numel()
        if not dense:
            return like.new_empty(shape)
        return like.new_empty_strided(shape, (image.numel(), *image.stride()))

    def is_last(self, of: str) -> bool:
        """Counts the slices that backward has been through; whether this is the last."""
        self._done[of] = (self._done[of] + 1) % self.count
        return not self._done[of]


class _Take(torch.autograd.Function):
    """Takes a slice of the input. The last one that backward comes to gives the gradient of the whole input."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, shared: _Shared, number: int) -> Tensor:
        ctx.shared, ctx.number = shared, number
        return shared.rows(features.detach(), number)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        shared = ctx.shared
        if shared.to_input is None:
            shared.to_input = shared.buffer(gradient)
        shared.rows(shared.to_input, ctx.number).copy_(gradient)
        whole = None
        if shared.is_last("input"):
            whole, shared.to_input = shared.to_input, None
        return whole, None, None


class _Place(torch.autograd.Function):
    """Writes the output of a slice to its place, and leaves a scalar in its stead."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, shared: _Shared, number: int) -> Tensor:
        ctx.shared, ctx.number = shared, number
        if shared.output is None:
            shared.output = shared.buffer(output)
        shared.rows(shared.output, number).copy_(output)
        return output.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None, None]:
        shared = ctx.shared
        own = shared.rows(shared.gradient, ctx.number)
        if shared.is_last("output"):
            shared.gradient = None
        return own, None, None


class _Join(torch.autograd.Function):
    """The output of all slices, once all are in their places."""

    @staticmethod
    def forward(ctx: Any, shared: _Shared, *ends: Tensor) -> Tensor:
        ctx.shared = shared
        output, shared.output = shared.output, None
        assert output is not None
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.shared.gradient = gradient
        # Nobody reads these, but for autograd's search for anomalies.
        return None, *[gradient.new_zeros(()) for _ in range(ctx.shared.count)]


def hands_mixed(unit: Unit) -> bool:
    """Whether a unit reads or hands along a value that cannot be told apart by images."""
    return "mixed" in unit.code[True].handed.values()


def why_not_sliced(model: nn.Module, chain: Chain, place: int) -> str | None:
    """Why a unit cannot run in slices of a batch, because its images are not on their own; None if it can.

    Two random images pass through a copy of the unit with random weights, in train and in eval mode: what it makes of
    the one must have no gradient with respect to the other, exactly. This finds whatever mixes images by computing with
    them. It does not find what a unit does with the numbers of a batch outside of autograd (a mean without gradient, a
    count of calls), unless a buffer changes by it. A model without values (on the meta device) is asked for batch norm
    alone.

    Args:
        model: the backbone; it is not changed.
        chain: its units.
        place: which of them.
    """
    unit = chain[place]
    for name in unit.modules:
        for inner, module in model.get_submodule(name).named_modules(prefix=name):
            if isinstance(module, _BatchNorm):
                return f"its batch norm {inner} looks at all images of a batch"
    if hands_mixed(unit):
        return "a value that it reads or hands along belongs to no single image"
    if any(tensor.is_meta for tensor in unit.used(model, nn.Module.parameters)):
        return None
    places = sorted(writers(chain, [place], 0))  # with the units whose values it reads
    root, units = private_units(model, [chain[i] for i in places], "none")
    like = next((p for p in root.parameters() if p.is_floating_point()), torch.empty(0))
    with torch.enable_grad(), torch.random.fork_rng(devices=[like.device] if like.is_cuda else []):
        torch.manual_seed(0)
        for parameter in root.parameters():
            if parameter.is_floating_point():
                nn.init.normal_(parameter, std=0.1)
        sources = [like.new_empty(_IMAGES, *(chain[i - 1].shape if i else chain.input_size)).normal_() for i in places]
        return _why_mixed(root, units, sources)


def _why_mixed(root: nn.Module, units: tuple[Unit, ...], sources: list[Tensor]) -> str | None:
    """Why the images of the last unit are not on their own; the others hand values along to it."""
    versions = {name: buffer._version for name, buffer in root.named_buffers()}
    for training in (True, False):
        root.train(training)
        context: dict[str, Any] = {}
        given = sources[-1].clone().requires_grad_()
        try:
            for unit, source in zip(units[:-1], sources, strict=False):
                unit(root, source, context)
            output = units[-1](root, given * 1, context)
        except Exception as error:  # a model's own code may raise anything at all
            return f"it fails on {_IMAGES} random images ({first_line(error)})"
        changed = [name for name, buffer in root.named_buffers() if buffer._version != versions.get(name)]
        if changed:
            return f"it changes its buffer {changed[0]} with each batch"
        for one in range(_IMAGES):
            if output.shape[:1] != (_IMAGES,) or not output.requires_grad:
                return "its output has no row for each image that depends on it"
            (gradient,) = torch.autograd.grad(
                (output[one] * torch.randn_like(output[one])).sum(), given, retain_graph=True, allow_unused=True
            )
            if gradient is not None and gradient[1 - one].count_nonzero():
                return "it mixes the images of a batch"
    return None
