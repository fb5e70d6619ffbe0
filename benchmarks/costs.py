"""Predicts what a step of each method takes on the paper's terms: Swin-Tiny, 224 px, batch 128, cut by stage.

python benchmarks/costs.py            about 10 minutes on one core; what the file has already is not run again
python benchmarks/costs.py --write    only writes what the package carries of it, src/localprop/bench/costs.yaml

Memory in fp32 and in bf16, time in bf16; for CUDA, eager, relative to end-to-end training. Exact rivals beside them:
checkpointing, exact training in modules, and the fastest exact setting that `localprop plan` finds within the memory of
some local ones. Writes benchmarks/results/costs.json.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
import yaml
from common import RESULTS, ROOT, write_result
from measuring import local_step
from rivals import SWIN, backbone

import localprop
from localprop.planning.simulation import simulate_own_step

BATCH = 128
TARGET = ROOT / "src" / "localprop" / "bench" / "costs.yaml"
STAGE = {"partition": "stage", "recompute": False}  # nothing is recomputed: the default on CUDA
FOUR = {"modules": 4, **STAGE}
FIRST = {"modules": 2, "cuts": ["layers.0"], "recompute": False}  # after the first stage: the published 0.64
MIDDLE = {"modules": 2, "cuts": ["layers.1"], "recompute": False}  # as in the suite four
DECODERS = ("pixel-shuffle", "conv", "deconv", "transformer")
FINISH = 0.1
_BY_STAGE = "exact K=4, by stage"


def cases() -> dict[str, dict[str, Any]]:
    """Name to the arguments of `localize`."""
    ours, image, local = "feature-reconstruction", "infopro", {"method": "feature-reconstruction"}
    found: dict[str, dict[str, Any]] = {"end-to-end": {"modules": 1, "method": "end-to-end"}}
    found["each block checkpointed"] = found["end-to-end"] | {"grad_checkpointing": True}
    for k in (2, 4):
        found[f"exact K={k}"] = {"modules": k, "method": "end-to-end"}
    found[_BY_STAGE] = {"modules": 4, "method": "end-to-end", **STAGE}
    # Ours at its best: cuts where they balance memory, cheap results computed again, cuts inside blocks.
    found[f"{ours} K=4, balanced"] = {**local, "modules": 4, "recompute": True}
    found[f"{ours} K=4, balanced, reach 1"] = {**local, "modules": 4, "recompute": True, "reach": 1}
    found[f"{ours} K=8, split"] = {**local, "modules": 8, "recompute": True, "split_blocks": True}
    for name, cut in (("K=4", FOUR), ("K=2", FIRST)):
        for decoder in DECODERS:
            found[f"{ours} {name}, {decoder}"] = {**local, "decoder": decoder, **cut}
        for decoder in ("pixel-shuffle", "conv"):
            found[f"{image} {name}, {decoder}"] = {"method": image, "decoder": decoder, **cut}
        found[f"greedy {name}"] = {"method": "greedy", **cut}
        found[f"{ours} {name}, reach 1"] = {**local, "reach": 1, **cut}
    # What else suites have.
    for method in ("trgl", "auglocal"):
        found[f"{method} K=4"] = {"method": method, **FOUR}
    for method, reach in ((ours, 0), (ours, 1), (image, 0), ("greedy", 0)):
        name = f"{method} K=2, cut in the middle" + (f", reach {reach}" if reach else "")
        found[name] = {"method": method, "reach": reach, **MIDDLE}
    return found


_RIVALLED = ("K=4, balanced", "K=4, reach 1", "K=8, split", "K=4, pixel-shuffle")
BUDGETS = {f"exact within {name}": f"feature-reconstruction {name}" for name in _RIVALLED}


def predicted(arguments: dict[str, Any]) -> dict[str, Any]:
    """Peaks (bytes) in both precisions, expected seconds in bf16, and the settings as they came out."""
    found: dict[str, Any] = {}
    for precision, dtype in (("fp32", None), ("bf16", torch.bfloat16)):
        own = {"kinetic": 0.0, "reach": 0} if arguments["method"] not in ("trgl", "end-to-end") else {}
        net = localprop.localize(backbone(SWIN), batch_size=BATCH, amp_dtype=dtype, **own | arguments)
        step = simulate_own_step(net, _step(dtype is not None), "cuda")
        found |= {f"{precision}_peak": step.peak, f"{precision}_seconds": step.seconds}
    recipe = net.recipe
    decodes = {"decoder": recipe.decoder} if recipe.method in ("feature-reconstruction", "infopro") else {}
    local = {"reach": recipe.reach or 0, "head": recipe.head} if recipe.method != "end-to-end" else {}
    settings = {"method": recipe.method, "modules": recipe.modules, "kinetic": recipe.kinetic, **decodes, **local}
    cuts = [module.units[-1] for module in net.local_modules[:-1]]
    return found | {"settings": settings, "cuts": cuts}


def _step(amp: bool) -> Callable[[localprop.LocalNetwork], Any]:
    return lambda fake: local_step(fake, BATCH, "cpu", amp)


def within(peak: int) -> dict[str, Any]:
    """The fastest exact setting in bf16 that takes at most `peak` bytes."""
    plan = localprop.plan(
        backbone(SWIN), BATCH, budget=peak, show="fits", reach=0, amp_dtype=torch.bfloat16, device="cuda"
    )
    row = plan.exact_fit
    assert row is not None
    recipe = row.setting.recipe
    return {
        "bf16_peak": row.step.peak, "bf16_seconds": row.step.seconds, "setting": row.setting.name,
        "cuts": recipe.cuts, "recompute_units": recipe.recompute_units,
    }  # fmt: skip


def main() -> None:
    """Predicts what is missing."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    path = RESULTS / "costs.json"
    rows: dict[str, Any] = json.loads(path.read_text())["rows"] if path.exists() else {}
    for name, arguments in () if options.write else cases().items():
        if name not in rows:
            rows[name] = predicted(arguments)
            _keep(rows, name)
    for name, local in () if options.write else BUDGETS.items():
        if name not in rows:
            rows[name] = within(rows[local]["bf16_peak"])
            _keep(rows, name)
    TARGET.write_text(content(rows), encoding="utf-8")
    print(f"wrote {TARGET.relative_to(ROOT)}")


def _keep(rows: dict[str, Any], name: str) -> None:
    first = rows["end-to-end"]
    for precision in ("fp32", "bf16"):
        for ratio, key in (("memory", "peak"), ("time", "seconds")):
            if f"{precision}_{key}" in rows[name]:
                rows[name][f"{precision}_{ratio}"] = round(
                    rows[name][f"{precision}_{key}"] / first[f"{precision}_{key}"], 4
                )
    print(name, {key: value for key, value in rows[name].items() if key.endswith(("memory", "time"))}, flush=True)
    rows[name]["commit"] = localprop.provenance()["commit"]
    write_result("costs", {"device": "cuda", "model": SWIN, "batch_size": BATCH, "rows": rows})


def content(rows: dict[str, Any]) -> str:
    """The text of the file that the package carries."""
    named = {"each block checkpointed": "each block checkpointed"}
    exact = {local: rows[name]["bf16_time"] for name, local in BUDGETS.items() if name in rows}
    found = []
    for name, arguments in cases().items():
        if name in rows and name != _BY_STAGE:
            own = {"name": named[name]} if name in named else {}
            own |= {"settings": rows[name]["settings"], "cut": _cut(arguments), **_ratios(rows[name])}
            found.append(own | ({"exact_time": exact[name]} if name in exact else {}))
    ahead = "feature-reconstruction K=4, reach 1"
    if ahead in rows and _BY_STAGE in rows:  # the larger peak, and the mean time of a run's steps
        before, after = _ratios(rows[ahead]), _ratios(rows[_BY_STAGE])
        own = {key: max(before[key], after[key]) for key in ("fp32", "memory")}
        own["time"] = round(before["time"] + FINISH * (after["time"] - before["time"]), 4)
        found.append({"settings": rows[ahead]["settings"] | {"finish": FINISH}, "cut": "stage", **own})
    head = (
        f"# What a step takes relative to end-to-end training: Swin-Tiny, 224 px, batch {BATCH}, AdamW, eager,\n"
        "# predicted for CUDA. Memory in fp32, memory and time in bf16. Written by `python benchmarks/costs.py`.\n"
    )
    return head + yaml.safe_dump(found, sort_keys=False, width=120, default_flow_style=None)


def _cut(arguments: dict[str, Any]) -> str | list[str]:
    if arguments.get("split_blocks"):
        return "inside blocks"
    return arguments.get("cuts") or arguments.get("partition", "balanced")


def _ratios(row: dict[str, Any]) -> dict[str, float]:
    return {"fp32": row["fp32_memory"], "memory": row["bf16_memory"], "time": row["bf16_time"]}


if __name__ == "__main__":
    main()
