"""Adds a method of your own in one file: PredSim, which trains an auxiliary head and matches similarities.

localprop train --plugin examples/own_method.py --method predsim
localprop bench examples/own_suite.yaml --plugin examples/own_method.py   compares it with the other methods
python examples/own_method.py [EPOCHS]     trains in a loop of your own, 4 epochs on scikit-learn's digits by default

Source: Noekland and Eidnes, Training Neural Networks with Local Error Signals, ICML 2019. The loss fits the cosine
similarities of a batch's features to those of its labels.
"""

import sys

import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import localprop


@localprop.METHODS.register("predsim")
class PredSim(localprop.HeadLoss):
    """(1 - `beta`) x the task's loss of a linear head + `beta` x mean squared difference of the similarities.

    Args:
        spec: describes the module that the loss is built for: layouts of its input and output, the task, the shape of
            a prediction.
        beta: weight of the similarities. Every argument after `spec` is an option: `--method-kwargs beta=0.9`.
    """

    uses_inputs = False  # the loss does not look at the images, so they are freed early

    def __init__(self, spec: localprop.ModuleSpec, beta: float = 0.99) -> None:
        super().__init__(spec)
        self.beta, self.layout, self.seen, self.classes = beta, spec.output, spec.seen, spec.prediction[-1]
        self.head = nn.Linear(spec.seen.channels, self.classes)
        self.project = nn.Linear(spec.output.channels, spec.output.channels)

    def judge(self, seen: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The head's term, and its logits."""
        return (1 - self.beta) * self.task.loss(logits := self.predict(seen), targets), logits

    def rest(self, output: Tensor, features: Tensor, inputs: None, targets: Tensor) -> Tensor:
        """The other term, which reads the output."""
        classes = targets if targets.is_floating_point() else F.one_hot(targets, self.classes).float()
        features = self.project(self.layout.tokens(output)).std(1)
        return self.beta * F.mse_loss(similarities(features), similarities(classes))

    def predict(self, output: Tensor) -> Tensor:
        """The head's logits for the output, or for what the next module's first blocks make of it."""
        return self.head(self.seen.pooled(output))


def similarities(vectors: Tensor) -> Tensor:
    """Cosine similarities (B, B) of the rows of `vectors` (B, D), each less its mean."""
    return (rows := F.normalize(vectors - vectors.mean(1, keepdim=True), dim=1)) @ rows.T


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
            heads = [float((x.argmax(1) == labels[test]).float().mean()) for x in net.module_predictions(images[test])]
        print(f"epoch {epoch + 1}  test accuracy of each module: {'  '.join(f'{x:.1%}' for x in heads)}")
