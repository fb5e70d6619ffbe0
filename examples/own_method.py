"""A method of one's own in one file: PredSim, an auxiliary head and the matching of similarities.

localprop train --plugin examples/own_method.py --method predsim
localprop bench examples/own_suite.yaml --plugin examples/own_method.py  # beside the others, under one protocol
python examples/own_method.py [EPOCHS]     in a loop of one's own, 4 epochs on scikit-learn's digits by default

Source: Noekland and Eidnes, Training Neural Networks with Local Error Signals, ICML 2019. Two images of one class
should look alike to a module, and two of different classes not: the cosine similarities of a batch's features are
fitted to those of its labels.
"""

import sys

import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import localprop


@localprop.METHODS.register("predsim")
class PredSim(localprop.LocalLoss):
    """(1 - `beta`) x criterion of a linear head + `beta` x mean squared difference of the similarities.

    Args:
        spec: the module it is built for: layouts of its input and output, number of classes, criterion.
        beta: weight of the similarities; every argument after `spec` is an option, `--method-kwargs beta=0.9`.
    """

    def __init__(self, spec: localprop.ModuleSpec, beta: float = 0.99) -> None:
        super().__init__()
        self.beta, self.criterion, self.layout, self.classes = beta, spec.criterion, spec.output, spec.num_classes
        self.head = nn.Linear(spec.output.channels, spec.num_classes)
        self.project = nn.Linear(spec.output.channels, spec.output.channels)

    def forward(self, output: Tensor, inputs: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See `localprop.LocalLoss.forward`."""
        logits = self.classify(output)
        seen = similarities(self.project(self.layout.tokens(output)).std(1))
        wanted = similarities(labels if labels.is_floating_point() else F.one_hot(labels, self.classes).float())
        return (1 - self.beta) * self.criterion(logits, labels) + self.beta * F.mse_loss(seen, wanted), logits

    def classify(self, output: Tensor) -> Tensor:
        """The head's logits, from features in whatever layout the backbone keeps them."""
        return self.head(self.layout.pooled(output))


def similarities(vectors: Tensor) -> Tensor:
    """Cosine similarities (B, B) of the rows of `vectors` (B, D), each less its mean."""
    rows = F.normalize(vectors - vectors.mean(1, keepdim=True), dim=1)
    return rows @ rows.T


if __name__ == "__main__":
    torch.manual_seed(0)
    digits = load_digits()
    images = (torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) - 5) / 6
    labels = torch.tensor(digits.target)
    train, test = torch.randperm(len(labels)).split([1500, 297])
    vit = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 48, "depth": 4, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **vit)
    net = localprop.localize(model, modules=4, method="predsim", method_kwargs={"beta": 0.9})
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for epoch in range(int(sys.argv[1]) if len(sys.argv) > 1 else 4):
        net.train()
        for batch in train[torch.randperm(len(train))].split(25):
            net.backward(images[batch], labels[batch])
            optimizer.step()
            optimizer.zero_grad()
        net.eval()
        with torch.no_grad():
            heads = [float((x.argmax(1) == labels[test]).float().mean()) for x in net.module_logits(images[test])]
        print(f"epoch {epoch + 1}  test accuracy of each module: {'  '.join(f'{x:.1%}' for x in heads)}")
