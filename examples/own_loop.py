"""Trains a small ViT on scikit-learn's digits by local learning, in a training loop of your own.

python examples/own_loop.py [EPOCHS]     4 epochs by default
"""

import sys
from functools import partial

import timm
import torch
from sklearn.datasets import load_digits

import localprop

torch.manual_seed(0)
digits = load_digits()
images = (torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) - 5) / 6  # (1797, 1, 8, 8)
labels = torch.tensor(digits.target)
train, test = torch.randperm(len(labels)).split([1500, 297])

vit = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 48, "depth": 4, "num_heads": 3}
model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **vit)
net = localprop.localize(model, modules=4)
gpu = torch.cuda.is_available()
device = "cuda" if gpu else "cpu"
net.to(device)
images, labels = images.to(device), labels.to(device)
# On a GPU a step is captured as CUDA graphs, which read the learning rate from a tensor.
rate = torch.tensor(3e-3, device=device) if gpu else 3e-3
optimizers = [
    torch.optim.AdamW(module.parameters(), lr=rate, fused=True, capturable=gpu) for module in net.local_modules
]


def step_module(k: int, loss: torch.Tensor) -> None:
    """Steps module k and frees its gradients, before module k+1 runs."""
    optimizers[k].step()
    optimizers[k].zero_grad()


backward = net.capture(after_module=step_module) if gpu else partial(net.backward, after_module=step_module)

for epoch in range(int(sys.argv[1]) if len(sys.argv) > 1 else 4):
    net.train()
    for batch in train[torch.randperm(len(train))].split(25):
        out = backward(images[batch], labels[batch])
    net.eval()
    with torch.no_grad():
        accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean()
    print(f"epoch {epoch + 1}  losses {[round(x, 3) for x in out.losses.tolist()]}  test {accuracy:.1%}")
