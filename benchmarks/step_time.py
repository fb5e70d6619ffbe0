"""Measures the time of a training step by local learning, relative to end-to-end training, in interleaved runs.

python benchmarks/step_time.py             Swin-Tiny at 32 px (patch 2, window 4), CPU, one thread, K=4: about 6 minutes
python benchmarks/step_time.py --small     the network of the suite cifar10-small, in bfloat16 like the suite

Prints the ratio for each method and writes benchmarks/results/step_time.json, or step_time_small.json. Both sides use
the same fused AdamW; a local step includes its K optimizer steps. Time is the CPU time of the process, because other
load disturbs it less than wall-clock time. The result has the median wall-clock time, too.
"""

import argparse
import statistics
import time

import timm
import torch
from common import write_result
from torch.nn import functional as F

import localprop

MODEL = "swin_tiny_patch4_window7_224"
CONV = {"decoder": "conv"}  # the default when the committed results were made
KEEP = {"recompute": False}
METHODS = {
    "greedy": {},
    "greedy, nothing recomputed": KEEP,
    "infopro": CONV,
    "infopro, nothing recomputed": CONV | KEEP,
    "feature-reconstruction": CONV,
    "feature-reconstruction, nothing recomputed": CONV | KEEP,
    "feature-reconstruction, pixel-shuffle": {"decoder": "pixel-shuffle"},
    "feature-reconstruction, pixel-shuffle, nothing recomputed": {"decoder": "pixel-shuffle", **KEEP},
}
SMALL = {"embed_dim": 48, "depths": (2, 2, 2, 2), "num_heads": (3, 6, 12, 24)}


def backbone(img_size: int, small: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"patch_size": 2, "window_size": 4, **(SMALL if small else {})}
    return timm.create_model(MODEL, num_classes=10, img_size=img_size, **sizes)


def end_to_end(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, autocast: torch.autocast):
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        with autocast:
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def local(net: localprop.LocalNetwork, images: torch.Tensor, labels: torch.Tensor, autocast: torch.autocast):
    optimizers = [torch.optim.AdamW(module.parameters(), fused=True) for module in net.local_modules]

    def step_module(k: int, loss: torch.Tensor) -> None:
        optimizers[k].step()
        optimizers[k].zero_grad()

    def step() -> None:
        with autocast:
            net.backward(images, labels, after_module=step_module)

    return step


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--modules", type=int, default=4)
    parser.add_argument("--batch-size", type=int, help="default: 32, or 64 with --small")
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    small = options.small
    options.batch_size = options.batch_size or (64 if small else 32)
    torch.set_num_threads(1)
    images = torch.randn(options.batch_size, 3, options.img_size, options.img_size)
    labels = torch.randint(0, 10, (options.batch_size,))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=small)
    steps = {"end-to-end": end_to_end(backbone(options.img_size, small), images, labels, autocast)}
    common = {"reach": 0, "input_size": images.shape[1:], "partition": "stage" if small else "balanced"}
    for name, choice in METHODS.items():
        model, method = backbone(options.img_size, small), name.partition(",")[0]
        net = localprop.localize(model, options.modules, method, **common, **choice)
        steps[name] = local(net, images, labels, autocast)
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    wall: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(options.rounds + 2):
        for name, step in steps.items():
            started, started_wall = time.process_time(), time.perf_counter()
            step()
            if round_ >= 2:  # the first two warm up: optimizer state, oneDNN's kernels
                cpu[name].append(time.process_time() - started)
                wall[name].append(time.perf_counter() - started_wall)
    rows = {}
    for name in steps:
        ratio = statistics.median(a / b for a, b in zip(cpu[name], cpu["end-to-end"], strict=True))
        rows[name] = {
            "cpu_ms": round(1000 * statistics.median(cpu[name]), 2),
            "wall_ms": round(1000 * statistics.median(wall[name]), 2),
            "ratio": round(ratio, 4),
        }
        print(f"{name:60s} {rows[name]['cpu_ms']:8.1f} ms  {ratio:.3f}x")
    write_result("step_time_small" if small else "step_time", vars(options) | {"model": MODEL, "rows": rows})


if __name__ == "__main__":
    main()
