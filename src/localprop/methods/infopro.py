"""InfoPro: each module predicts the label and rebuilds the input image.

Source: Wang et al., Revisiting Locally Supervised Learning: an Alternative to End-to-end Training, ICLR 2021
(equations 5 to 8). On a Swin backbone it is the InfoPro-Transformer that arXiv 2212.14215 compares with.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from localprop.errors import ConfigError
from localprop.heads import build_head
from localprop.network.loss import HeadLoss, ModuleSpec

# (first, last) weights of image reconstruction and of the task by the number of modules, as the authors tuned them
# for a ResNet-110 on CIFAR-10.
_PUBLISHED_WEIGHTS = {
    2: ((5.0, 5.0), (0.5, 0.5)),
    4: ((1.0, 0.0), (0.0, 1.0)),
    8: ((5.0, 0.0), (0.0, 1.0)),
    16: ((5.0, 0.5), (0.0, 1.0)),
}


class InfoPro(HeadLoss):
    """lambda_reconstruction x cross-entropy of the rebuilt image + lambda_task x task term.

    Both weights go linearly from the first module to the last but one. A task term of weight 0 is left out.

    Args:
        spec: the module it is built for.
        task: "softmax", the criterion on a head's prediction; or "contrast", supervised contrast of a head's
            128 features (Khosla et al., NeurIPS 2020), which needs integer labels.
        lambda_reconstruction: (first, last) weight of the reconstruction.
        lambda_task: (first, last) weight of the task term.
        published: whether to take in place of both weights those that the authors published for the nearest K. The
            defaults are what was better for a small Swin on CIFAR-10.
        temperature: temperature of the contrast.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        spec: ModuleSpec,
        task: Literal["softmax", "contrast"] = "softmax",
        lambda_reconstruction: tuple[float, float] = (1.0, 1.0),
        lambda_task: tuple[float, float] = (1.0, 1.0),
        published: bool = False,
        temperature: float = 0.07,
    ) -> None:
        super().__init__(spec)
        if task not in ("softmax", "contrast"):
            raise ConfigError(f"infopro: task is {task!r}; it is softmax or contrast")
        if published:
            nearest = min(_PUBLISHED_WEIGHTS, key=lambda count: abs(count - spec.count))
            lambda_reconstruction, lambda_task = _PUBLISHED_WEIGHTS[nearest]
        self.reconstruction_weight = _at(lambda_reconstruction, spec, "lambda_reconstruction")
        self.task_weight = _at(lambda_task, spec, "lambda_task")
        if not self.reconstruction_weight and not self.task_weight:
            raise ConfigError(
                f"infopro: lambda_reconstruction and lambda_task are 0 in module {spec.index + 1} of {spec.count}; "
                "raise one of them"
            )
        self.task_term = task
        self.temperature = temperature
        self.head = self.decoder = None
        if self.task_weight:
            self.head = spec.build_head() if task == "softmax" else build_head(spec.head, spec.seen, 128)
        if self.reconstruction_weight:
            if not len(spec.mean) == len(spec.std) == spec.source.channels:
                raise ConfigError(
                    f"infopro: mean has {len(spec.mean)} and std {len(spec.std)} values, but images have "
                    f"{spec.source.channels} channels; pass one for each"
                )
            self.decoder = spec.build_decoder(spec.source)
        self.uses_inputs = self.decoder is not None
        self.register_buffer("mean", torch.tensor(spec.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(-1, 1, 1), persistent=False)

    def judge(self, seen: Tensor, targets: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The weighted task term; see `HeadLoss.judge`."""
        if self.head is None:
            return None, None
        head = self.head(seen)
        if self.task_term == "contrast":
            return self.task_weight * supervised_contrast(head, targets, self.temperature), None
        return self.task_weight * self.task.loss(head, targets), head

    def rest(self, output: Tensor, features: Tensor, inputs: Tensor | None) -> Tensor | None:
        """The weighted cross-entropy of the rebuilt image; see `HeadLoss.rest`."""
        if self.decoder is None:
            return None
        assert inputs is not None  # as uses_inputs says
        pixels = (inputs * self.std + self.mean).clamp(0, 1)
        rebuilt = self.decoder(output).float()
        return self.reconstruction_weight * F.binary_cross_entropy_with_logits(rebuilt, pixels.float())

    def predict(self, output: Tensor) -> Tensor | None:
        """The head's prediction; None for contrast, whose head predicts nothing."""
        return self.head(output) if self.head is not None and self.task_term == "softmax" else None


def supervised_contrast(features: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss on L2-normalised features (Khosla et al., NeurIPS 2020, equation 2).

    Args:
        features: (B, D).
        labels: (B,) integers.
        temperature: divides the similarities.

    Returns:
        The mean over those images that share their label with another image of the batch; 0 if none does.
    """
    if labels.is_floating_point():
        raise ConfigError("infopro with task=contrast needs integer labels; switch off mixup and cutmix")
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


def _at(ends: tuple[float, float], spec: ModuleSpec, name: str) -> float:
    """The weight of this module, on the line from the first module to the last but one."""
    try:
        first, last = (float(value) for value in ends)
    except (TypeError, ValueError):
        raise ConfigError(f"infopro: {name} is {ends!r}; it takes two numbers, for the first and last") from None
    ratio = spec.index / (spec.count - 2) if spec.count > 2 else 0.0
    return first + (last - first) * ratio
