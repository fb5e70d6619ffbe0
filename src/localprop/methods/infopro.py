"""InfoPro: each module predicts the label and rebuilds the input image.

Source: Wang et al., Revisiting Locally Supervised Learning: an Alternative to End-to-end Training, ICLR 2021
(equations 5 to 8). On a Swin backbone it is the InfoPro-Transformer that arXiv 2212.14215 compares with.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from localprop.errors import ConfigError
from localprop.methods.common import Ends, TaskTerm, by_depth, require_a_term
from localprop.network.loss import ModuleSpec

# (first, last) weights of image reconstruction and of the task by the number of modules, as the authors tuned them
# for a ResNet-110 on CIFAR-10.
_PUBLISHED_WEIGHTS = {
    2: ((5.0, 5.0), (0.5, 0.5)),
    4: ((1.0, 0.0), (0.0, 1.0)),
    8: ((5.0, 0.0), (0.0, 1.0)),
    16: ((5.0, 0.5), (0.0, 1.0)),
}


class InfoPro(TaskTerm):
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
        lambda_reconstruction: Ends = (1.0, 1.0),
        lambda_task: Ends = (1.0, 1.0),
        published: bool = False,
        temperature: float = 0.07,
    ) -> None:
        if task not in ("softmax", "contrast"):
            raise ConfigError(f"infopro: task is {task!r}; it is softmax or contrast")
        if published:
            nearest = min(_PUBLISHED_WEIGHTS, key=lambda count: abs(count - spec.count))
            lambda_reconstruction, lambda_task = _PUBLISHED_WEIGHTS[nearest]
        task_weight = by_depth(lambda_task, spec, "lambda_task")
        super().__init__(spec, task_weight, task == "contrast", temperature)
        self.reconstruction_weight = by_depth(lambda_reconstruction, spec, "lambda_reconstruction")
        require_a_term(spec, lambda_reconstruction=self.reconstruction_weight, lambda_task=task_weight)
        self.decoder = None
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

    def rest(self, output: Tensor, features: Tensor, inputs: Tensor | None, targets: Tensor) -> Tensor | None:
        """The weighted cross-entropy of the rebuilt image; see `HeadLoss.rest`."""
        if self.decoder is None:
            return None
        assert inputs is not None  # as uses_inputs says
        pixels = (inputs * self.std + self.mean).clamp(0, 1)
        rebuilt = self.decoder(output).float()
        return self.reconstruction_weight * F.binary_cross_entropy_with_logits(rebuilt, pixels.float())
