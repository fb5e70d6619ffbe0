"""Compares local learning with its alternatives in one run: memory and time per step of each.

python benchmarks/alternatives.py     Swin-Tiny, 224 px, batch 16, fp32, one thread: about 8 minutes

Memory is the allocator's (see measuring.py). Time is the median CPU time of interleaved steps, relative to end-to-end
training in the same round; on CUDA it is wall-clock time. 8-bit AdamW needs torchao. Writes
benchmarks/results/alternatives.json, on CUDA alternatives_cuda.json.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch
from common import write_result
from measuring import batch_of, local_step, peak_of, prime
from torch import nn
from torch.nn import functional as F

import localprop

MODEL = "swin_tiny_patch4_window7_224"
MICRO = 4
Step = tuple[Callable[[], None], list[torch.Tensor]]


class LoRA(nn.Module):
    """A frozen linear map plus a trained one of low rank (Hu et al., ICLR 2022)."""

    def __init__(self, linear: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(linear.in_features, rank, bias=False)
        self.up = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.up(self.down(x))


def backbone() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(MODEL, num_classes=10)


def adapted() -> nn.Module:
    model = backbone().requires_grad_(False)
    model.head.requires_grad_(True)
    for name, module in list(model.named_modules()):
        parent, _, own = name.rpartition(".")
        if isinstance(module, nn.Linear) and own in ("qkv", "proj", "fc1", "fc2"):
            setattr(model.get_submodule(parent), own, LoRA(module))
    return model


def ordinary(model: nn.Module, batch_size: int, device: str, micro: int | None = None, low_bit: bool = False) -> Step:
    """An ordinary training step, in one piece or accumulated over micro-batches."""
    model.to(device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    if low_bit:
        from torchao.optim import AdamW8bit

        if device == "cpu":
            torch.compiler.set_stance("force_eager")  # its compiler takes minutes on a CPU
        optimizer = AdamW8bit(trained)
    else:
        optimizer = torch.optim.AdamW(trained, fused=True)
    state = prime([optimizer])

    def step() -> None:
        images, labels = batch_of(batch_size, device)
        size = micro or batch_size
        for part, own in zip(images.split(size), labels.split(size), strict=True):
            (F.cross_entropy(model(part), own) * (size / batch_size)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, [*model.parameters(), *model.buffers(), *state]


def checkpointed() -> nn.Module:
    model = backbone()
    model.set_grad_checkpointing()
    return model


def steps(batch_size: int, device: str) -> dict[str, Callable[[], Step]]:
    """Functions that build each step, by its name."""

    def local(modules: int, method: str = "feature-reconstruction", **options) -> Callable[[], Step]:
        options = {"decoder": "conv"} | options  # the default when the committed results were made
        return lambda: local_step(
            localprop.localize(backbone(), modules, method, batch_size=batch_size, **options), batch_size, device
        )

    return {
        "end-to-end": lambda: ordinary(backbone(), batch_size, device),
        "end-to-end, recompute": local(1, "end-to-end", recompute=True),
        "end-to-end, timm's checkpointing": lambda: ordinary(checkpointed(), batch_size, device),
        f"end-to-end, micro-batches of {MICRO}": lambda: ordinary(backbone(), batch_size, device, micro=MICRO),
        "end-to-end, 8-bit AdamW": lambda: ordinary(backbone(), batch_size, device, low_bit=True),
        "LoRA, rank 8": lambda: ordinary(adapted(), batch_size, device),
        "K=2": local(2),
        "K=4": local(4),
        "K=4, recompute off": local(4, recompute=False),
        "K=4, pixel-shuffle decoder, linear head": local(4, decoder="pixel-shuffle", head="linear"),
        "K=4, checkpointing": local(4, grad_checkpointing=True),
        "K=8, split": local(8, split_blocks=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    built, rows = {}, {}
    for name, build in steps(options.batch_size, options.device).items():
        step, kept = build()
        built[name] = step
        rows[name] = {"peak": peak_of(step, kept, options.device) if options.device == "cpu" else None}
        if options.device == "cuda":  # only one at a time, or each would count the others' weights
            rows[name]["peak"] = peak_of(step, kept, "cuda")
            del built[name]
        print(f"{name:42s} {rows[name]['peak'] / 2**20:8.1f} MiB", flush=True)
        del step, kept
    times: dict[str, list[float]] = {name: [] for name in rows}
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    for _ in range(options.rounds):
        for name, build in steps(options.batch_size, options.device).items():
            step = built[name] if name in built else build()[0]
            for count in range(1 if name in built else 4):
                if options.device == "cuda":
                    torch.cuda.synchronize()
                started = clock()
                step()
                if options.device == "cuda":
                    torch.cuda.synchronize()
                if count or name in built:
                    times[name].append(clock() - started)
            del step
    for name, row in rows.items():
        row["memory_ratio"] = round(row["peak"] / rows["end-to-end"]["peak"], 4)
        row["ms"] = round(1000 * statistics.median(times[name]), 1)
        ratios = [a / b for a, b in zip(times[name], times["end-to-end"], strict=True)]
        row["time_ratio"] = round(statistics.median(ratios), 4)
        print(f"{name:42s} memory {row['memory_ratio']:.3f}  time {row['time_ratio']:.3f}")
    name = "alternatives" if options.device == "cpu" else f"alternatives_{options.device}"
    write_result(name, vars(options) | {"model": MODEL, "rows": rows})


if __name__ == "__main__":
    main()
