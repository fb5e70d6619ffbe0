"""Compares times of a training step with what `localprop.plan` predicts, each relative to end-to-end training.

python benchmarks/clock.py measure      on a CPU, one thread, about 12 minutes; writes benchmarks/results/clock_cpu.json
python benchmarks/clock.py compare      that file, and benchmarks/results/gpu_ba3b577, against predictions of the
                                        present code: about 5 minutes; writes benchmarks/results/clock.json
"""

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any
from unittest import mock

import timm
import torch
from common import RESULTS, write_result
from measuring import batch_of, local_step, prime
from torch.nn import functional as F

import localprop
from localprop.memory.speed import MACHINES

SWIN, VIT = "swin_tiny_patch4_window7_224", "vit_small_patch16_224"
PLAIN, CHECKPOINTED = {"modules": 1}, {"modules": 1, "grad_checkpointing": True}
LOCAL = {
    "end-to-end": PLAIN,
    "timm's checkpointing": CHECKPOINTED,
    "K=2": {"modules": 2, "reach": 0},
    "K=4": {"modules": 4, "reach": 0},
}
MORE = {
    "K=4, recompute off": {"modules": 4, "reach": 0, "recompute": False},
    "K=4, split": {"modules": 4, "reach": 0, "split_blocks": True},
    "K=8, split": {"modules": 8, "reach": 0, "split_blocks": True},
    "4 micro-batches": {"modules": 1, "micro_batches": 4},
}


@dataclass(frozen=True, eq=False)
class Group:
    """Settings that are timed in turns, relative to the first.

    Attributes:
        model: name in timm.
        batch_size: images per step.
        amp: whether in bfloat16.
        settings: arguments of `localize` by name; those of one module are plain training.
    """

    model: str
    batch_size: int
    amp: bool = False
    settings: dict[str, dict[str, Any]] = field(default_factory=lambda: LOCAL)


GROUPS = [  # on a CPU
    Group(SWIN, 8, settings=LOCAL | MORE),
    Group(VIT, 8),
    Group(SWIN, 8, amp=True),
    Group(SWIN, 16, settings=LOCAL | {"4 micro-batches": MORE["4 micro-batches"]}),
]

# What an H200 was measured with: benchmarks/results/gpu_ba3b577/README.md.
FIRST = ["layers.0.blocks.0", "layers.0.blocks.1"]
ON_GPU = {"decoder": "conv", "recompute": True, "reach": 0}
FOUR = ON_GPU | {"modules": 4, "cuts": [*FIRST, "layers.2.blocks.0"]}
EIGHT = ["layers.0.blocks.0.attn", "layers.0.blocks.0.mlp", "layers.0.blocks.1.attn", "layers.1.blocks.0.attn"]
LATER = {True: ["2.blocks.0", "2.blocks.2", "2.blocks.4"], False: ["1.blocks.1", "2.blocks.1", "2.blocks.4"]}


def on_gpu(amp: bool) -> dict[str, dict[str, Any]]:
    """Settings of Swin-Tiny by name."""
    eight = [*EIGHT, *(f"layers.{name}.attn" for name in LATER[amp])]
    return {
        "end-to-end": PLAIN,
        "timm checkpointing": CHECKPOINTED,
        "K=2": ON_GPU | {"modules": 2, "cuts": FIRST[1:]},
        "K=4": FOUR,
        "K=8 split": ON_GPU | {"modules": 8, "split_blocks": True, "cuts": eight},
    }


MORE_ON_GPU = {
    "K=4 no recompute": FOUR | {"recompute": False},
    "K=4 stage": FOUR | {"cuts": ["layers.0.blocks.1", "layers.1.blocks.1", "layers.2.blocks.5"]},
    "K=4 greedy": {name: value for name, value in FOUR.items() if name != "decoder"} | {"method": "greedy"},
    "K=4 checkpointing": FOUR | {"cuts": [*FIRST, "layers.2.blocks.5"], "grad_checkpointing": True},
    "micro /4 + checkpointing": CHECKPOINTED | {"micro_batches": 4},
}
VIT_B = "vit_base_patch16_224"
VIT_FOUR = ON_GPU | {"modules": 4, "cuts": ["blocks.2", "blocks.5", "blocks.8"]}
GPU_GROUPS = [
    Group(SWIN, 128, True, on_gpu(True) | MORE_ON_GPU),
    Group(SWIN, 128, False, on_gpu(False)),
    Group(
        VIT_B,
        64,
        True,
        {
            "end-to-end": PLAIN,
            "timm checkpointing": CHECKPOINTED,
            "K=2": ON_GPU | {"modules": 2, "cuts": ["blocks.5"]},
            "K=4": VIT_FOUR,
            "K=4 checkpointing": VIT_FOUR | {"grad_checkpointing": True},
        },
    ),
]
# When they were measured, recomputation called Python for each function, which cost the host twice as much:
# benchmarks/results/recompute_before.json against recompute.json.
THEN = replace(MACHINES["cuda"], host=replace(MACHINES["cuda"].host, hooked=2 * MACHINES["cuda"].host.hooked))
# Ratios that the script printed before it was stopped.
VIT_PRINTED = {"timm checkpointing": 1.79, "K=2": 1.16, "K=4": 1.67, "K=4 checkpointing": 2.48}


def built(group: Group, settings: dict[str, Any]) -> Callable[[], None]:
    """A training step on the CPU, as a user writes it."""
    torch.manual_seed(0)
    model, settings = timm.create_model(group.model, num_classes=10), dict(settings)
    if settings["modules"] > 1:
        half = torch.bfloat16 if group.amp else None
        arguments = {"batch_size": group.batch_size, "amp_dtype": half}
        net = localprop.localize(model, method="feature-reconstruction", **arguments, **settings)
        return local_step(net, group.batch_size, "cpu", group.amp)[0]
    if settings.get("grad_checkpointing"):
        model.set_grad_checkpointing()
    optimizer, parts = torch.optim.AdamW(model.train().parameters(), fused=True), settings.get("micro_batches", 1)
    prime([optimizer])

    def step() -> None:
        images, labels = batch_of(group.batch_size, "cpu")
        for part, own in zip(images.chunk(parts), labels.chunk(parts), strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=group.amp):
                loss = F.cross_entropy(model(part), own) / parts
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def once(step: Callable[[], None]) -> tuple[float, float, float, int]:
    """Of one step: processor seconds, those of them in the kernel, wall-clock seconds, and pages touched first."""
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    step()
    after, wall = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - began
    system = after.ru_stime - before.ru_stime
    return after.ru_utime - before.ru_utime + system, system, wall, after.ru_minflt - before.ru_minflt


def timed(group: Group, rounds: int) -> dict[str, dict[str, float]]:
    """Medians of interleaved steps; `ratio` is that to the first setting in the same round."""
    steps = {name: built(group, settings) for name, settings in group.settings.items()}
    found: dict[str, list[tuple[float, float, float, int]]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            took = once(step)
            if number:  # the first warms up
                found[name].append(took)
    usual = [took[0] for took in next(iter(found.values()))]
    rows = {}
    for name, all_times in found.items():
        seconds, system, wall, pages = (statistics.median(values) for values in zip(*all_times, strict=True))
        ratio = statistics.median(took[0] / base for took, base in zip(all_times, usual, strict=True))
        rows[name] = {
            "seconds": round(seconds, 4),
            "in_kernel": round(system, 4),
            "wall": round(wall, 4),
            "pages": pages,
            "ratio": round(ratio, 4),
            "all": [round(took[0], 4) for took in all_times],
        }
        print(
            f"{group.model:30s} {group.batch_size:3d} {name:24s} {seconds:7.3f} s {system:7.3f} {ratio:.3f}", flush=True
        )
    return rows


def measure(rounds: int, model: str | None) -> None:
    """Times all groups, or those of one model; the other rows of the file stay then."""
    torch.set_num_threads(1)
    path = RESULTS / "clock_cpu.json"
    kept = json.loads(path.read_text())["rows"] if model else []
    rows = [row for row in kept if row["model"] != model]
    for group in GROUPS:
        if model in (None, group.model):
            known = {"model": group.model, "batch_size": group.batch_size, "amp": group.amp, "rounds": rounds}
            rows += [known | {"name": name} | own for name, own in timed(group, rounds).items()]
    write_result("clock_cpu", {"load": os.getloadavg(), "rows": rows})


def predicted(group: Group, settings: dict[str, Any], device: str) -> float:
    """The time of a setting relative to end-to-end training, as `localprop.plan` has it."""
    settings = {"modules": 1, "grad_checkpointing": False} | settings
    modules, checkpointed, parts = (
        settings.pop(name, None) for name in ("modules", "grad_checkpointing", "micro_batches")
    )
    if modules > 1:
        settings = {"method": "feature-reconstruction", "grad_checkpointing": checkpointed} | settings
    plan = localprop.plan(
        timm.create_model(group.model, num_classes=10),
        group.batch_size,
        modules=(modules,),
        micro_batches=parts,
        amp_dtype=torch.bfloat16 if group.amp else None,
        device=device,
        **({"method": "end-to-end"} | settings),
    )
    step = plan.rows[-1].step if modules > 1 else plan.rows[1 if checkpointed else 0].step
    return step.seconds / predicted_alone(group, device) if parts else step.seconds / plan.baseline.step.seconds


@cache
def predicted_alone(group: Group, device: str) -> float:
    """Seconds of end-to-end training in one piece."""
    half = torch.bfloat16 if group.amp else None
    model = timm.create_model(group.model, num_classes=10)
    plan = localprop.plan(model, group.batch_size, modules=(1,), method="end-to-end", amp_dtype=half, device=device)
    return plan.baseline.step.seconds


def compare(only: str | None, model: str | None) -> None:
    """Prints and writes predicted and measured ratios, of a CPU and of an H200; of one of them, or of one model."""
    cpu = json.loads((RESULTS / "clock_cpu.json").read_text())["rows"]
    measured = {(row["model"], row["batch_size"], row["amp"], row["name"]): row["ratio"] for row in cpu}
    gpu = json.loads((RESULTS / "gpu_ba3b577" / "measure224.json").read_text())["rows"]
    alone = {row["amp"]: row["ms"] for row in gpu if row["name"] == "end-to-end"}
    on_cuda = {(SWIN, 128, row["amp"], row["name"]): row["ms"] / alone[row["amp"]] for row in gpu}
    on_cuda |= {(VIT_B, 64, True, name): ratio for name, ratio in VIT_PRINTED.items()}
    path = RESULTS / "clock.json"
    kept = json.loads(path.read_text())["rows"] if only or model else []
    rows = [row for row in kept if (only and row["device"] != only) or (model and row["model"] != model)]
    for device, known, groups in (("cpu", measured, GROUPS), ("cuda", on_cuda, GPU_GROUPS)):
        for group in groups:
            if only not in (None, device) or model not in (None, group.model):
                continue
            for name, settings in list(group.settings.items())[1:]:
                key = (group.model, group.batch_size, group.amp, name)
                pair = {"predicted": round(predicted(group, settings, device), 4), "measured": round(known[key], 4)}
                described = dict(zip(("model", "batch_size", "amp", "name"), key, strict=True))
                error = {"error": round(pair["predicted"] / pair["measured"] - 1, 4)}
                if device == "cuda" and settings.get("recompute"):
                    with mock.patch.dict(MACHINES, cuda=THEN):
                        then = predicted(group, settings, device)
                    error |= {"then": round(then, 4), "error_then": round(then / known[key] - 1, 4)}
                rows.append({"device": device} | described | pair | error)
                print(f"{device:4s} {key!s:80s} {pair['predicted']:.3f} {pair['measured']:.3f} {error}", flush=True)
    write_result("clock", {"rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["measure", "compare"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="compares this one only, and keeps the other's rows")
    parser.add_argument("--model", help="takes this one only, and keeps the rows of the others")
    options = parser.parse_args()
    if options.what == "measure":
        measure(options.rounds, options.model)
    else:
        compare(options.device, options.model)


if __name__ == "__main__":
    main()
