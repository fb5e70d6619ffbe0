"""Peaks predicted for CUDA against those that were measured on an H200: benchmarks/results/gpu_ba3b577."""

import json
import re

import pytest
import timm
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from localprop import localize
from localprop.memory.kernels import kernels_of
from localprop.memory.tracker import MACHINES, Tracker
from localprop.planning.simulation import simulate_step
from localprop.settings.config import OptimConfig
from places import ROOT

SWIN, VIT = "swin_tiny_patch4_window7_224", "vit_base_patch16_224"
FOLDER = ROOT / "benchmarks" / "results" / "gpu_ba3b577"
MEASURED = {
    (SWIN, "bf16" if row["amp"] else "fp32", row["name"]): row["peak"]
    for row in json.loads((FOLDER / "measure224.json").read_text())["rows"]
}
MEASURED[VIT, "bf16", "end-to-end"] = 5489 * 2**20  # which FOLDER/README.md has
CLOSE = {"bf16": 0.02, "fp32": 0.01}
CUTS = ["layers.0.blocks.0", "layers.0.blocks.1", "layers.2.blocks.0"]
# Since they were measured, recomputation and the decoder `conv` need less memory now. So K=8 in bf16 and K=4
# by stage, whose peaks are made of that, are not here, and `K=4 greedy` may be predicted lower.
NETWORKS = {
    "end-to-end": {"modules": 1, "method": "end-to-end"},
    "K=2": {"modules": 2, "method": "feature-reconstruction", "cuts": CUTS[1:2]},
    "K=4": {"modules": 4, "method": "feature-reconstruction", "cuts": CUTS},
    "K=4 greedy": {"modules": 4, "method": "greedy", "cuts": CUTS},
}
NETWORKS["K=4 no recompute"] = NETWORKS["K=4"]


PAGE = (ROOT / "docs" / "memory.md").read_text()
PUBLISHED = {  # predicted MiB by precision and measured MiB
    (precision, int(measured)): int(predicted)
    for precision, measured, predicted in re.findall(r"\| (bf16|fp32) \| (\d+) \| (\d+) \| -[\d.]+% \|", PAGE)
}


def assert_close(peak, model, precision, name):
    measured = round(MEASURED[model, precision, name] / 2**20)
    assert PUBLISHED[precision, measured] == pytest.approx(peak / 2**20, rel=0.005), "docs/memory.md says otherwise"
    error = peak / MEASURED[model, precision, name] - 1
    lower = 0.05 if name == "K=4 greedy" else CLOSE[precision]
    assert -lower < error < CLOSE[precision], f"{error:+.1%}"


@pytest.mark.parametrize(
    ("name", "precision", "model"),
    [
        ("end-to-end", "bf16", SWIN),
        ("K=2", "bf16", SWIN),
        ("K=4", "bf16", SWIN),
        ("K=4 no recompute", "bf16", SWIN),
        ("K=4 greedy", "bf16", SWIN),
        ("end-to-end", "bf16", VIT),
        ("end-to-end", "fp32", SWIN),
        ("K=2", "fp32", SWIN),
        ("K=4", "fp32", SWIN),
    ],
)
def test_the_predicted_peak_is_the_one_measured_on_a_gpu(name, precision, model):
    mixed, batch = precision == "bf16", 64 if model == VIT else 128
    backbone = timm.create_model(model, num_classes=10)
    settings = {**NETWORKS[name], "recompute": name not in ("end-to-end", "K=4 no recompute")}
    if settings["method"] == "feature-reconstruction":
        settings["decoder"] = "conv"
    half = torch.bfloat16 if mixed else None
    net = localize(backbone, **settings, batch_size=batch, amp_dtype=half, device="cuda")
    step = simulate_step(net, OptimConfig(batch_size=batch, amp=mixed), batch, (3, 224, 224), "cuda")
    assert_close(step.peak, model, precision, name)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("timm checkpointing", "bf16"),
        ("timm checkpointing", "fp32"),
        ("checkpoint stages 0,1", "bf16"),
        ("micro /4 + checkpointing", "bf16"),
    ],
)
def test_the_peak_of_a_plain_loop_is_the_one_measured_on_a_gpu(name, precision):
    """Of training without local modules: timm checkpoints whole blocks, and local modules more than that."""
    with FakeTensorMode(), kernels_of("cuda"), Tracker(MACHINES["cuda"]) as tracker:
        tracker.keep_buffers()
        model = timm.create_model(SWIN, num_classes=10).train()
        if "stages" in name:
            for block in [*model.layers[0].blocks, *model.layers[1].blocks]:
                block.forward = lambda x, run=block.forward: checkpoint(run, x, use_reentrant=False)
        else:
            model.set_grad_checkpointing()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for _ in range(2):  # the second finds the optimizer's state
            start = len(tracker.events)
            images, labels = torch.empty(128, 3, 224, 224), torch.empty(128, dtype=torch.long)
            size = 32 if "micro" in name else 128
            for part, own in zip(images.split(size), labels.split(size), strict=True):
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    loss = F.cross_entropy(model(part), own) * (size / 128)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_close(max(tracker.in_use()[start:]), SWIN, precision, name)
