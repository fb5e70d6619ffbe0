"""What methods with a head share: weights by depth, and a task's term that may be supervised contrast."""

import torch
from torch import Tensor
from torch.nn import functional as F

from localprop.errors import ConfigError
from localprop.network.loss import HeadLoss, ModuleSpec

Ends = tuple[float, float]
"""A weight of the first module and of the last but one; those between lie on the line."""

_CONTRASTED = 128  # features, as in InfoPro's code


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
