"""What methods share: weights by depth, a task's term that may be supervised contrast, and a rebuilt input."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from localprop.decoders.common import Decoder
from localprop.errors import ConfigError
from localprop.grids.positions import random_positions, select
from localprop.network.loss import HeadLoss, ModuleSpec

Ends = tuple[float, float]
"""A weight of the first module and of the last but one; those between lie on the line."""

_CONTRASTED = 128  # features, as in InfoPro's code
_PARTS = 4


class TaskTerm(HeadLoss):
    """weight x the criterion on a head's prediction, or weight x supervised contrast of 128 features of the head.

    Supervised contrast (Khosla et al., NeurIPS 2020) pulls images of one label together; it predicts nothing.

    Args:
        spec: the module it is built for.
        weight: of the term; with 0 there is no head.
        contrast: whether it is supervised contrast.
        temperature: of the contrast.

    Raises:
        ConfigError: the contrast has no labels to go by, or the temperature is not above 0.
    """

    uses_inputs = False

    def __init__(self, spec: ModuleSpec, weight: float, contrast: bool, temperature: float) -> None:
        super().__init__(spec)
        self.task_weight, self.contrast, self.temperature = weight, contrast, temperature
        if contrast and not spec.task.hard_labels:
            raise ConfigError(
                f"supervised contrast needs one integer label for each {spec.task.unit}; leave out the contrast, or "
                "mixup and cutmix"
            )
        if not temperature > 0:
            raise ConfigError(f"temperature is {temperature:g}; it must be above 0")
        self.head = None
        if weight:
            self.head = spec.build_head(_CONTRASTED if contrast else None)

    def judge(self, seen: Tensor, targets: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The weighted term; see `HeadLoss.judge`."""
        if self.head is None:
            return None, None
        head = self.head(seen)
        if self.contrast:
            return self.task_weight * supervised_contrast(head, targets, self.temperature), None
        return self.task_weight * self.task.loss(head, targets), head

    def predict(self, output: Tensor) -> Tensor | None:
        """The head's prediction; None for contrast, whose head predicts nothing."""
        return None if self.head is None or self.contrast else self.head(output)

    def extra_repr(self) -> str:
        """What its cost depends on beside its nets."""
        return "contrast" if self.contrast else ""


class Rebuilding(TaskTerm):
    """The task's term + weight x mean squared error of the module's rebuilt input. A term of weight 0 has no net.

    Args:
        spec: the module it is built for.
        task: weight of the task's term.
        weight: of the reconstruction.
        normalize: whether each position of target features is normalised over channels; not of the image.
        sample: part of the positions that is rebuilt, above 0 and at most 1.
        contrast: see `TaskTerm`.
        temperature: likewise.

    Raises:
        ConfigError: `sample` is not such a part, the decoder rebuilds the grid as a whole, or both terms are 0.
    """

    def __init__(
        self,
        spec: ModuleSpec,
        task: float,
        weight: float,
        normalize: bool,
        sample: float,
        contrast: bool = False,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(spec, task, contrast, temperature)
        self.weight = weight
        require_a_term(spec, reconstruction=weight, task=task)
        self.target = spec.input
        self.normalize = normalize and spec.index > 0
        self.decoder = spec.build_decoder(spec.input) if weight else None
        self.sampled = _sampled(self.decoder, sample, spec.decoder) if self.decoder else None

    def rest(self, output: Tensor, features: Tensor, inputs: Tensor | None, targets: Tensor) -> Tensor | None:
        """The weighted error of the rebuilt input; see `HeadLoss.rest`."""
        if self.decoder is None:
            return None
        rebuilt, target = self._rebuilt(self.decoder, output, self.target.grid(features))
        return self.weight * reconstruction_error(rebuilt, target, self.normalize)

    def _rebuilt(self, decoder: Decoder, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """What the decoder rebuilds, and the part of the target that it is."""
        if not self.sampled:
            return decoder(output), target
        height, width = decoder.size
        positions = random_positions(len(output), height * width, self.sampled, output.device)
        return decoder(output, positions), select(target, positions, decoder.patch or 1)


class Judging(TaskTerm):
    """The task's term alone, as a method: greedy local learning, under whatever name.

    Args:
        spec: the module it is built for.
        task: (first, last) weight of the criterion on the head's prediction: of the first module, and of the last but
            one. Alone it scales all gradients of a module, which AdamW makes up for; beside a kinetic term it matters.
        contrast: of how many modules, from the first, the criterion is supervised contrast.
        temperature: of the contrast.

    Raises:
        ConfigError: a weight below 0, or of 0, with which a module would learn nothing.
    """

    def __init__(self, spec: ModuleSpec, task: Ends = (1.0, 1.0), contrast: int = 0, temperature: float = 0.07) -> None:
        weight = by_depth(task, spec, "task")
        require_a_term(spec, task=weight)
        super().__init__(spec, weight, contrasts(contrast, spec), temperature)


def by_depth(ends: Ends, spec: ModuleSpec, name: str) -> float:
    """The weight of a module, on the line from the first module to the last but one.

    Args:
        ends: of the first module, and of the last but one.
        spec: of the module.
        name: of the option, for the message.

    Raises:
        ConfigError: they are not two numbers of at least 0.
    """
    try:
        first, last = (float(value) for value in ends)
    except (TypeError, ValueError):
        raise ConfigError(f"{name} is {ends!r}; it takes two numbers, for the first and last module") from None
    if not (first >= 0 and last >= 0):
        raise ConfigError(f"{name} is {ends!r}; its weights must be at least 0")
    ratio = spec.index / (spec.count - 2) if spec.count > 2 else 0.0
    return first + (last - first) * ratio


def require_a_term(spec: ModuleSpec, **weights: float) -> None:
    """Raises a ConfigError where all weights of a module, by the names of their options, are 0."""
    if not any(weights.values()):
        names, verb = " and ".join(weights), "are" if len(weights) > 1 else "is"
        one = "one of them" if len(weights) > 1 else "it"
        raise ConfigError(
            f"{names} {verb} 0 in module {spec.index + 1} of {spec.count}, which would learn nothing; raise {one}"
        )


def contrasts(count: int, spec: ModuleSpec) -> bool:
    """Whether a module is among the first `count`, which learn by supervised contrast.

    Raises:
        ConfigError: the number is below 0.
    """
    if count < 0:
        raise ConfigError(f"contrast is {count}; it is a number of modules, at least 0")
    return spec.index < count


def supervised_contrast(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss on L2-normalised features (Khosla et al., NeurIPS 2020, equation 2).

    Args:
        features: (B, D).
        labels: (B,) integers.
        temperature: divides the similarities.

    Returns:
        The mean over those images that share their label with another image of the batch; 0 if none does.

    Raises:
        ConfigError: labels are mixed, and no integers.
    """
    if labels.is_floating_point():
        raise ConfigError("supervised contrast needs integer labels; leave out the contrast, or mixup and cutmix")
    # In float32: autocast would multiply in half precision, and the temperature makes its errors 14 times larger.
    with torch.autocast(features.device.type, enabled=False):
        features = F.normalize(features.float(), dim=1)
        similarity = features @ features.T / temperature
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    log_probability = similarity.masked_fill(itself, float("-inf")).log_softmax(1).masked_fill(itself, 0)
    same = (labels[:, None] == labels[None]) & ~itself
    partners = same.sum(1)
    per_image = -(log_probability * same).sum(1) / partners.clamp(min=1)
    return per_image.sum() / (partners > 0).sum().clamp(min=1)


def _sampled(decoder: Decoder, sample: float, name: str) -> int | None:
    """The number of positions that are rebuilt; None for all."""
    if not 0 < sample <= 1:
        raise ConfigError(f"sample is {sample:g}; it must be above 0 and at most 1")
    if sample == 1:
        return None
    if not getattr(decoder, "single_positions", False):  # which a plugin's may lack
        raise ConfigError(
            f"sample is {sample:g}, but decoder {name} rebuilds the grid as a whole; choose "
            "decoder pixel-shuffle, or sample=1"
        )
    length = math.prod(decoder.size)
    count = max(round(sample * length), 1)
    return count if count < length and decoder.patch else None


class _Error(torch.autograd.Function):
    """The mean squared error, keeping of it the difference alone, which becomes the gradient where it lies."""

    @staticmethod
    def forward(ctx: Any, rebuilt: Tensor, target: Tensor, normalize: bool) -> Tensor:
        # In float32: squares of half-precision features lose most of their digits. In parts: so that the float32
        # and the normalised copy of the target never exist as a whole.
        difference, total = torch.empty_like(rebuilt), rebuilt.new_zeros((), dtype=torch.float32)
        size = -(-len(rebuilt) // _PARTS)
        for part, own, expected in zip(*(t.split(size) for t in (difference, rebuilt, target)), strict=True):
            expected = expected.permute(0, 2, 3, 1).float()
            if normalize:
                expected = F.layer_norm(expected, expected.shape[-1:])
            error = own.float() - expected.permute(0, 3, 1, 2)
            total += error.square().sum()
            part.copy_(error)
        # Not saved for backward as autograd means it: it is written to there, so there is no second backward.
        ctx.difference = difference
        return total / rebuilt.numel()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        difference, ctx.difference = ctx.difference, None
        return difference.mul_(gradient * 2 / difference.numel()), None, None


def reconstruction_error(rebuilt: Tensor, target: Tensor, normalize: bool) -> Tensor:
    """The mean squared error of a rebuilt grid, in float32.

    Args:
        rebuilt: (B, C, H, W).
        target: (B, C, H, W); gets no gradient.
        normalize: whether each position of the target is normalised over channels first.
    """
    return _Error.apply(rebuilt, target, normalize)
