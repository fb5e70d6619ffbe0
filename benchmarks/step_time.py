"""Time of a training step by local learning against end-to-end, from interleaved runs.

python benchmarks/step_time.py     Swin-Tiny at 32 px (patch 2, window 4), CPU, one thread, K=4: about 4 minutes

Prints the ratio for each method and writes benchmarks/results/step_time.json. Both sides use the same fused AdamW;
a local step includes its K optimizer steps. Time is the CPU time of the process, which other load disturbs less than
the wall clock; the wall clock's median is kept beside it.
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
METHODS = {
    "greedy": {},
    "infopro": {"method_kwargs": {"published": True}},
    "feature-reconstruction": {},
    "feature-reconstruction, pixel-shuffle": {"decoder": "pixel-shuffle"},
}


def backbone(img_size: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(MODEL, num_classes=10, img_size=img_size, patch_size=2, window_size=4)


def end_to_end(images: torch.Tensor, labels: torch.Tensor):
    model = backbone(images.shape[-1])
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def local(images: torch.Tensor, labels: torch.Tensor, modules: int, method: str, options: dict):
    size = (3, *images.shape[2:])
    net = localprop.localize(backbone(size[1]), modules, method, input_size=size, **options)
    optimizers = [torch.optim.AdamW(module.parameters(), fused=True) for module in net.local_modules]

    def step_module(k: int, loss: torch.Tensor) -> None:
        optimizers[k].step()
        optimizers[k].zero_grad()

    return lambda: net.backward(images, labels, after_module=step_module)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--modules", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = torch.randn(options.batch_size, 3, options.img_size, options.img_size)
    labels = torch.randint(0, 10, (options.batch_size,))
    steps = {"end-to-end": end_to_end(images, labels)}
    for name, choice in METHODS.items():
        steps[name] = local(images, labels, options.modules, name.partition(",")[0], choice)
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
        print(f"{name:40s} {rows[name]['cpu_ms']:8.1f} ms  {ratio:.3f}x")
    write_result("step_time", vars(options) | {"model": MODEL, "rows": rows})


if __name__ == "__main__":
    main()
