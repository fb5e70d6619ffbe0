"""What `plan --budget` proposes for trained weights: predicted memory and time of each way within 4, 8 and 16 GiB.

python benchmarks/finetuning.py           ViT-B/16 and Swin-Tiny at 224 px, AdamW, bf16, for CUDA: three minutes of one
                                          core
--models NAME ... takes some of the models only; results of others in the file stay.

Memory and time do not depend on what the weights are, so no weights are needed. Writes
benchmarks/results/finetuning.json, from which `python benchmarks/publish_finetuning.py` makes docs/finetuning.md's
tables.
"""

import argparse
import json
import time
from typing import Any

import timm
import torch
from common import RESULTS, write_result

import localprop
from localprop.planning.reporting import plan_lines
from localprop.settings.flags import parse
from localprop.settings.plan import PlanConfig

BATCHES = {"vit_base_patch16_224": 64, "swin_tiny_patch4_window7_224": 128}
BUDGETS = (4, 8, 16)
CLASSES = 10
SHOWN = "vit_base_patch16_224"
"""Of whose plan for the least budget the page shows what is printed."""


def described(plan: localprop.Plan, row: localprop.PlanRow) -> dict[str, Any]:
    recipe = row.setting.recipe
    return {
        "setting": row.setting.name,
        "method": recipe.method,
        "modules": len(row.module_units),
        "cuts": recipe.cuts,
        "freeze": recipe.freeze,
        "freeze_modules": recipe.freeze_modules,
        "recompute_units": recipe.recompute_units,
        "micro_batches": row.micro_batches,
        "offload": row.setting.offload,
        "opt": row.setting.opt,
        "as_asked": row.setting.same_numbers,
        "peak": row.peak,
        "memory_ratio": round(plan.memory_ratio(row), 4),
        "flops_ratio": round(plan.flops_ratio(row), 4),
        "time_ratio": round(plan.time_ratio(row), 4),
    }


def proposals(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is proposed for a model within each budget, and what the command says of the least."""
    torch.manual_seed(0)
    model, found, printed = timm.create_model(name, num_classes=CLASSES), [], {}
    options = {"amp_dtype": torch.bfloat16, "device": "cuda", "show": "fits", "trained": True}
    for budget in BUDGETS:
        began = time.process_time()
        plan = localprop.plan(model, BATCHES[name], budget=budget * 2**30, **options)
        own = {kind: row and described(plan, row) for kind, row in plan.fits.items()}
        taken = next(kind for kind, row in plan.fits.items() if row is plan.choice)
        found.append({"gib": budget, "taken": taken, **own, "seconds": round(time.process_time() - began, 1)})
        print(name, budget, taken, *(row and (row["setting"], row["time_ratio"]) for row in own.values()), flush=True)
        printed = printed or said(name, budget, plan)
    return {"batch_size": BATCHES[name], "whole": plan.baseline.peak, "budgets": found}, printed


def said(name: str, budget: int, plan: localprop.Plan) -> dict[str, Any]:
    """The command of a plan, and what it says below its table."""
    words = ["--model", name, "--initial-checkpoint", "weights.safetensors", "--num-classes", str(CLASSES)]
    words += ["--batch-size", str(BATCHES[name]), "--precision", "bf16", "--device", "cuda", "--budget", f"{budget}GiB"]
    lines = plan_lines(parse(PlanConfig, "plan", words, PlanConfig()), plan)
    return {"command": " ".join(["localprop", "plan", *words]), "lines": lines[2:]}


def main() -> None:
    """Reads the flags."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", choices=list(BATCHES), default=list(BATCHES))
    path = RESULTS / "finetuning.json"
    known = json.loads(path.read_text()) if path.exists() else {"models": {}}
    for name in parser.parse_args().models:
        found, printed = proposals(name)
        known["models"][name] = localprop.provenance() | found
        if name == SHOWN:
            known["printed"] = printed
        write_result("finetuning", {key: known[key] for key in ("printed", "models") if key in known})


if __name__ == "__main__":
    main()
