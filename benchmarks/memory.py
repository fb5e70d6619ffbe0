"""Measures peak memory of real training steps, and compares it with end-to-end training and with `localprop.plan`.

python benchmarks/memory.py table     Swin-Tiny, 224 px, AdamW, fp32, batch 32 and 128: about 25 minutes on two cores
python benchmarks/memory.py micro     the same at batch 128, in four micro-batches: about 5 minutes
python benchmarks/memory.py grid      five models, fp32 and bf16, K = 1, 2, 4, max, with and without checkpointing:
                                      about 15 minutes
python benchmarks/memory.py reach     Swin-Tiny with heads that read ahead, batch 128 predicted and batch 8 measured:
                                      about 5 minutes
python benchmarks/memory.py slices    Swin-Tiny with units in slices of the batch, batch 128 predicted and batch 8
                                      measured: about 10 minutes
--device cuda measures `torch.cuda.max_memory_allocated` instead of the CPU allocator's events.

Writes benchmarks/results/memory_table.json, memory_grid.json, memory_micro.json, memory_reach.json and
memory_slices.json, on CUDA with _cuda.
"""

import argparse
import json
import time

import timm
import torch
from common import RESULTS, write_result
from measuring import local_step, peak_of

import localprop
from localprop.planning.simulation import simulate_own_step

SWIN = "swin_tiny_patch4_window7_224"
GRID = [SWIN, "vit_small_patch16_224", "deit_tiny_patch16_224", "convnext_tiny", "pvt_v2_b1"]
CONV = {"decoder": "conv", "reach": 0}  # the defaults when the committed results were made
LIGHT = {"decoder": "pixel-shuffle", "head": "linear"}


def backbone(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10)


def measure(name: str, row: localprop.PlanRow, device: str, amp: bool = False, conv: bool = True, **options) -> dict:
    """Trains one real step of a plan's row; returns predicted and measured bytes."""
    setting, local = row.setting, row.setting.modules > 1
    net = localprop.localize(
        backbone(name),
        setting.modules,
        setting.method,
        split_blocks=setting.split_blocks,
        grad_checkpointing=setting.grad_checkpointing,
        batch_size=row.batch_size,
        micro_batches=row.micro_batches,
        amp_dtype=torch.bfloat16 if amp else None,
        **((CONV if conv else {}) | options if local else {}),
    )
    assert [module.units for module in net.local_modules] == row.module_units  # the plan describes this very network
    step, kept = local_step(net, row.batch_size, device, amp, row.micro_batches)
    started = time.perf_counter()
    peak = peak_of(step, kept, device)
    result = {
        "model": name,
        "setting": setting.name,
        "method": setting.method,
        **options,
        "modules": setting.modules,
        "split_blocks": setting.split_blocks,
        "grad_checkpointing": setting.grad_checkpointing,
        "batch_size": row.batch_size,
        "micro_batches": row.micro_batches,
        "precision": "bf16" if amp else "fp32",
        "predicted": row.step.peak,
        "measured": peak,
        "error_percent": round(100 * (row.step.peak / peak - 1), 3),
    }
    print(
        f"{name:30s} {setting.method:22s} {setting.name:20s} batch {row.batch_size:3d} {result['precision']} "
        f"{peak / 2**20:8.1f} MiB, predicted {result['error_percent']:+.2f}%  ({time.perf_counter() - started:.0f} s)",
        flush=True,
    )
    return result


def table(device: str) -> None:
    """The numbers that docs/memory.md and the README quote."""
    rows: list[dict] = []

    def add(batch_size: int, modules: list, **options) -> None:
        plan = localprop.plan(backbone(SWIN), batch_size, modules=modules, device=device, **CONV | options)
        first = not any(r["batch_size"] == batch_size for r in rows)
        arguments = {k: v for k, v in options.items() if k not in ("method", "split_blocks")}
        for row in plan.rows:
            if row.setting.modules > 1 or first:
                rows.append(measure(SWIN, row, device, **arguments))
                baseline = next(r for r in rows if r["batch_size"] == batch_size and r["setting"] == "end-to-end")
                rows[-1]["ratio"] = round(rows[-1]["measured"] / baseline["measured"], 4)
                print(f"{'':54s} ratio {rows[-1]['ratio']:.3f}", flush=True)

    add(32, [2, 3, 4, 6, 8, "max"])
    add(32, [2, 4, 8, "max"], split_blocks=True, **LIGHT)
    add(32, [2, 4, 8], recompute=False)
    add(32, [2, 4, 8, "max"], method="infopro", method_kwargs={"published": True})
    add(32, [2, 4], method="greedy")
    add(32, [2, 4], partition="stage")
    add(128, [4, 8])
    write_result(_name("memory_table", device), {"device": device, "rows": rows})


def micro(device: str) -> None:
    """The same in micro-batches; ratios are relative to undivided batches, which `table` measures."""
    plan = localprop.plan(backbone(SWIN), 128, modules=[4, 8], micro_batches=4, device=device, **CONV)
    rows = [measure(SWIN, row, device) for row in plan.rows]
    write_result(_name("memory_micro", device), {"device": device, "rows": rows})


def grid(device: str) -> None:
    """The errors of predictions."""
    rows = []
    for name in GRID:
        for amp in (False, True):
            for checkpointing in (False, True):
                dtype = torch.bfloat16 if amp else None
                plan = localprop.plan(
                    backbone(name), 8, modules=[2, 4, "max"], amp_dtype=dtype, device=device,
                    grad_checkpointing=checkpointing, **CONV,
                )  # fmt: skip
                for row in plan.rows:
                    if row.setting.grad_checkpointing == checkpointing:
                        rows.append(measure(name, row, device, amp))
    errors = [abs(row["error_percent"]) for row in rows]
    print(f"largest error {max(errors):.2f}%, mean {sum(errors) / len(errors):.2f}%, {len(rows)} steps")
    write_result(_name("memory_grid", device), {"device": device, "largest_error_percent": max(errors), "rows": rows})


def reach(device: str) -> None:
    """Heads that read one block ahead, or have copies of later blocks: peaks and operations against end-to-end."""
    stage = {"recompute_units": {"patch_embed": "whole", "layers.0": "whole"}}
    cases: list[dict] = [{"reach": 0}, {"reach": 1}, {"reach": 1, **stage}]
    heads: list[dict] = [{"reach": 0, "head": "successor", "head_kwargs": {"depth": depth}} for depth in (1, 2)]
    path = RESULTS / f"{_name('memory_reach', device)}.json"
    rows: list[dict] = json.loads(path.read_text())["rows"] if path.exists() else []  # what is there is not run again
    keys = ("reach", "recompute_units", "head", "head_kwargs", "split_blocks")
    for batch_size, splits in ((128, (False, True)), (8, (False,))):
        all_cases = [own | {"split_blocks": split} for split in splits for own in cases]
        for options in [*all_cases, *(own | {"split_blocks": False} for own in heads)]:
            there = [row for row in rows if row["batch_size"] == batch_size]
            if any({key: row[key] for key in keys if key in row} == options for row in there):
                continue
            plan = localprop.plan(backbone(SWIN), batch_size, modules=[2, 4], device=device, **options)
            for row in (row for row in plan.rows[2:] if row.setting.split_blocks == options["split_blocks"]):
                if batch_size == 128:
                    own = {"modules": row.setting.modules, **options, "batch_size": batch_size}
                    own["predicted"] = row.step.peak
                else:
                    given = {name: value for name, value in options.items() if name != "split_blocks"}
                    own = measure(SWIN, row, device, conv=False, **given) | options
                ratios = {"ratio": plan.memory_ratio(row), "flops_ratio": plan.flops_ratio(row)}
                own |= {name: round(value, 4) for name, value in ratios.items()}
                own |= {"cuts": [units[-1] for units in row.module_units[:-1]]}
                rows.append(own | {"commit": localprop.provenance()["commit"]})
                print(rows[-1], flush=True)
    write_result(_name("memory_reach", device), {"device": device, "model": SWIN, "rows": rows})


def slices(device: str) -> None:
    """Units that run in slices of the batch: peaks and operations against end-to-end training in one piece."""
    early = ("patch_embed", "layers.0", "layers.1")

    def local(modules: int, names: tuple[str, ...] = (), count: int = 0) -> dict:
        sliced = dict.fromkeys(names, f"whole/{count}")
        return {"modules": modules, "reach": 0, "split_blocks": True, "recompute_units": sliced}

    whole = {"modules": 1, "method": "end-to-end"}
    everything = ("patch_embed", "layers")
    cases: list[dict] = [whole, local(8), *(local(8, early, count) for count in (2, 4, 8)), local(8, everything, 8)]
    cases.append(whole | {"recompute_units": dict.fromkeys(everything, "whole/8")})
    path = RESULTS / f"{_name('memory_slices', device)}.json"
    keys = ("modules", "method", "reach", "split_blocks", "recompute_units", "batch_size")
    rows: list[dict] = json.loads(path.read_text())["rows"] if path.exists() else []  # what is there is not run again
    for batch_size, options in ((size, own) for size in (128, 8) for own in cases):
        own = options | {"batch_size": batch_size}
        if any({key: row[key] for key in keys if key in row} == own for row in rows):
            continue
        net = localprop.localize(backbone(SWIN), batch_size=batch_size, **options)
        step = simulate_own_step(net, lambda fake, size=batch_size: local_step(fake, size, "cpu"), device)
        row = own | {"predicted": step.peak, "flops": step.flops}
        if batch_size == 8:
            row["measured"] = peak_of(*local_step(net, batch_size, device), device)
            row["error_percent"] = round(100 * (step.peak / row["measured"] - 1), 3)
        row["cuts"] = [module.units[-1] for module in net.local_modules[:-1]]
        first = next((r for r in rows if r["batch_size"] == batch_size and r["modules"] == 1), row)
        row["ratio"] = round(step.peak / first["predicted"], 4)
        row["flops_ratio"] = round(step.flops / first["flops"], 4)
        print(row, flush=True)
        rows.append(row | {"commit": localprop.provenance()["commit"]})
        write_result(_name("memory_slices", device), {"device": device, "model": SWIN, "rows": rows})


def _name(name: str, device: str) -> str:
    return name if device == "cpu" else f"{name}_{device}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["table", "grid", "micro", "reach", "slices"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    what = {"table": table, "grid": grid, "micro": micro, "reach": reach, "slices": slices}
    what[options.what](options.device)


if __name__ == "__main__":
    main()
