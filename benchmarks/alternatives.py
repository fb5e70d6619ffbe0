"""Compares local learning with its alternatives: memory and time of a training step of each, for four models.

python benchmarks/alternatives.py predict             predicted for CUDA, bf16, at training batches: about 30 minutes
python benchmarks/alternatives.py measure             measured on one thread of a CPU, fp32, batch 8: about 20 minutes
--models NAME ... takes some of the models only, and --only NAME ... some of the rows, beside end-to-end training; what
else is in the files stays.

Predicted: the very step that is measured runs on fake tensors. Measured: memory is the allocator's (see measuring.py),
time is the median of the CPU time of interleaved steps, relative to end-to-end training in the same round. 8-bit AdamW
needs torchao, LoRA needs peft. Writes benchmarks/results/alternatives_predicted.json and alternatives_measured.json,
from which `python benchmarks/publish_alternatives.py` makes the tables of docs/memory.md.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch
from common import RESULTS, write_result
from measuring import peak_of
from rivals import CONVNEXT, SWIN, VIT_B, VIT_S, Rival, rivals, step_of
from torch import nn

import localprop
from localprop.planning.simulation import simulate_own_step

BATCHES = {SWIN: 128, VIT_S: 128, VIT_B: 64, CONVNEXT: 128}
MEASURED = 8


def predicted(net: nn.Module, rival: Rival, batch_size: int, device: str, amp: bool) -> dict[str, float]:
    """Peak (bytes), floating point operations and expected seconds of a step, which runs on fake tensors."""
    if "opt" in rival.options:  # which keeps tables of its first step: they have to be real
        step_of(nn.Linear(64, 64), 1, "cpu", amp=False, **rival.options)
    return simulate_own_step(net, lambda fake: step_of(fake, batch_size, "cpu", amp, **rival.options), device)._asdict()


def predict(models: list[str], only: list[str] | None, amp: bool, device: str) -> None:
    """Predicts every rival at a training batch."""
    for model in models:
        rows: dict[str, Any] = {}
        for rival in _chosen(only):
            started = time.perf_counter()
            rows[rival.name] = _told(rival)
            try:
                net = rival.network(model, BATCHES[model], amp)
            except localprop.LocalpropError as error:
                rows[rival.name]["not_run"] = str(error)
                print(f"{model} {rival.name}: {error}", flush=True)
                continue
            rows[rival.name] |= predicted(net, rival, BATCHES[model], device, amp)
            _relate(rows, rival.name, {"memory_ratio": "peak", "flops_ratio": "flops", "time_ratio": "seconds"})
            print(f"{model:30s} {rows[rival.name]} ({time.perf_counter() - started:.0f} s)", flush=True)
        precision = "bf16" if amp else "fp32"
        name = "alternatives_predicted" if (device, amp) == ("cuda", True) else f"alternatives_{device}_{precision}"
        _keep(name, model, {"device": device, "precision": precision, "batch_size": BATCHES[model], "rows": rows}, only)


def measure(models: list[str], only: list[str] | None, rounds: int) -> None:
    """Measures every rival on one thread at a small batch, beside what is predicted for that."""
    torch.set_num_threads(1)
    for model in models:
        rows: dict[str, Any] = {}
        steps = {}
        for rival in _chosen(only):
            rows[rival.name] = _told(rival)
            try:
                net = rival.network(model, MEASURED, False)
            except localprop.LocalpropError as error:
                rows[rival.name]["not_run"] = str(error)
                continue
            rows[rival.name]["predicted"] = predicted(net, rival, MEASURED, "cpu", amp=False)
            step, kept = step_of(net, MEASURED, "cpu", amp=False, **rival.options)
            rows[rival.name]["peak"] = peak_of(step, kept, "cpu")
            steps[rival.name] = step
            _relate(rows, rival.name, {"memory_ratio": "peak"})
            error = rows[rival.name]["predicted"]["peak"] / rows[rival.name]["peak"] - 1
            rows[rival.name]["error_percent"] = round(100 * error, 2)
            print(f"{model:30s} {rival.name:45s} {rows[rival.name]}", flush=True)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(rounds):
            for name, step in steps.items():
                started = time.process_time()
                step()
                times[name].append(time.process_time() - started)
        base = next(iter(times.values()))
        for name, own in times.items() if rounds else ():
            rows[name]["ms"] = round(1000 * statistics.median(own), 1)
            rows[name]["time_ratio"] = round(statistics.median(a / b for a, b in zip(own, base, strict=True)), 4)
            print(f"{model:30s} {name:45s} {rows[name]['memory_ratio']:.3f} {rows[name]['time_ratio']:.3f}", flush=True)
        _keep(
            "alternatives_measured", model, {"batch_size": MEASURED, "rounds": rounds, "threads": 1, "rows": rows}, only
        )


def _chosen(only: list[str] | None) -> list[Rival]:
    """The rivals to look at: end-to-end training, with which the others are compared, is always one."""
    every = rivals()
    return [rival for rival in every if only is None or rival is every[0] or rival.name in only]


def _told(rival: Rival) -> dict[str, Any]:
    return {"kind": rival.kind, "gradients": rival.gradients, "accuracy": rival.accuracy}


def _relate(rows: dict[str, Any], name: str, ratios: dict[str, str]) -> None:
    """Adds ratios to end-to-end training, the first row."""
    first = next(iter(rows.values()))
    rows[name] |= {ratio: round(rows[name][own] / first[own], 4) for ratio, own in ratios.items()}


def _keep(name: str, model: str, found: dict[str, Any], only: list[str] | None) -> None:
    """Writes the results of one model, or rows of them, beside others; each has the commit that it is of."""
    path, own = RESULTS / f"{name}.json", localprop.provenance()
    others = json.loads(path.read_text())["models"] if path.exists() else {}
    if only and model in others:
        rows = {row: found["rows"][row] | {"commit": own["commit"], "versions": own["versions"]} for row in only}
        found = others[model] | {"rows": others[model]["rows"] | rows}
    else:
        found = own | found
    write_result(name, {"models": others | {model: found}})


def main() -> None:
    """Reads the flags."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["predict", "measure"])
    parser.add_argument("--models", nargs="+", choices=list(BATCHES), default=list(BATCHES))
    parser.add_argument("--only", nargs="+", choices=[rival.name for rival in rivals()], help="rows")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="whose kernels to predict")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16", help="of what is predicted")
    parser.add_argument("--rounds", type=int, default=3, help="of steps whose time is measured; 0 for memory alone")
    options = parser.parse_args()
    if options.what == "predict":
        predict(options.models, options.only, options.precision == "bf16", options.device)
    else:
        measure(options.models, options.only, options.rounds)


if __name__ == "__main__":
    main()
