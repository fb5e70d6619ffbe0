"""Feature reconstruction: each module predicts the label and rebuilds its own input features.

Source: Local Learning on Transformers via Feature Reconstruction, arXiv 2212.14215. What a module receives, it must
be able to rebuild from what it gives: so little of the information that later modules need is lost on the way. The
first module's input is the image. The paper's loss weights are not published.
"""

from torch import Tensor
from torch.nn import functional as F

from localprop.decoders import build_decoder
from localprop.heads import build_head
from localprop.network import LocalLoss, ModuleSpec


class FeatureReconstruction(LocalLoss):
    """Criterion of the head's prediction + `weight` x mean squared error of the rebuilt input.

    Args:
        spec: the module it is built for.
        weight: weight of the reconstruction.
        normalize: whether each position of the target features is normalised over channels (mean 0, variance 1),
            as masked autoencoders do with patches. Without it the error grows with the features' scale, which a
            module can lower by shrinking its output. The image is a target as it is.
    """

    def __init__(self, spec: ModuleSpec, weight: float = 1.0, normalize: bool = True) -> None:
        super().__init__()
        self.criterion = spec.criterion
        self.weight = weight
        self.target = spec.input
        self.normalize = normalize and spec.index > 0
        self.head = build_head(spec.head, spec.output, spec.num_classes)
        self.decoder = build_decoder(spec.decoder, spec.output, spec.input)

    def forward(self, output: Tensor, inputs: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See `LocalLoss.forward`."""
        logits = self.head(output)
        # In float32: squares of half-precision features lose most of their digits.
        target = self.target.grid(inputs).float()
        if self.normalize:
            channels_last = target.permute(0, 2, 3, 1)
            target = F.layer_norm(channels_last, channels_last.shape[-1:]).permute(0, 3, 1, 2)
        error = F.mse_loss(self.decoder(output).float(), target)
        return self.criterion(logits, labels) + self.weight * error, logits

    def classify(self, output: Tensor) -> Tensor:
        """The head's logits."""
        return self.head(output)
