"""The fastest exact and local settings for any memory: what they take, and what a real step of some of them takes.

python benchmarks/budget.py           Swin-Tiny, 224 px, AdamW, fp32, batch 128, for a CPU; ViT-B, batch 64, bf16, for
                                      CUDA, with and without offloading; and steps of Swin-Tiny at batch 8, measured:
                                      about 15 minutes on one core

Writes benchmarks/results/budget.json.
"""

import time

import timm
import torch
from common import write_result
from measuring import local_step, peak_of

import localprop

SWIN, VIT = "swin_tiny_patch4_window7_224", "vit_base_patch16_224"
# Budgets as parts of what end-to-end training takes.
SHARES = {SWIN: (0.15, 0.18, 0.22, 0.24, 0.28, 0.42), VIT: (0.3, 0.32, 0.36, 0.45)}
MEASURED = (0.5, 0.6, 0.75)  # of batch 8, where weights and moments take a larger part


def backbone(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10)


def described(plan: localprop.Plan, row: localprop.PlanRow) -> dict:
    recipe = row.setting.recipe
    return {
        "setting": row.setting.name,
        "method": recipe.method,
        "cuts": recipe.cuts,
        "recompute_units": recipe.recompute_units,
        "micro_batches": row.micro_batches,
        "peak": row.step.peak,
        "ratio": round(plan.memory_ratio(row), 4),
        "flops_ratio": round(plan.flops_ratio(row), 4),
        "time_ratio": round(plan.time_ratio(row), 4),
    }


def fits(name: str, batch_size: int, shares: tuple[float, ...], **options) -> dict:
    """The fastest settings within parts of end-to-end training's memory."""
    model, found = backbone(name), []
    whole = localprop.plan(model, batch_size, modules=(1,), method="end-to-end", **options).baseline.step.peak
    for share in shares:
        began = time.process_time()
        plans = [
            localprop.plan(model, batch_size, budget=int(share * whole), show="fits", reach=reach, **options)
            for reach in (0, 1)
        ]
        rows = {"exact": plans[0].exact_fit, "local": plans[0].local_fit, "local, reach 1": plans[1].local_fit}
        own = {kind: row and described(plans[0], row) for kind, row in rows.items()}
        found.append({"share": share, **own, "seconds": round(time.process_time() - began, 1)})
        print(name, share, *(own[k] and {n: own[k][n] for n in list(own[k])[-4:]} for k in own), flush=True)
    return {"model": name, "batch_size": batch_size, "whole": whole, "budgets": found}


def measured(batch_size: int = 8) -> list[dict]:
    """Predicted and measured peaks of real steps of the settings that are found."""
    rows, whole = [], localprop.plan(backbone(SWIN), batch_size, modules=(2,)).baseline.step.peak
    for share in MEASURED:
        plan = localprop.plan(backbone(SWIN), batch_size, budget=int(share * whole), show="fits", reach=0)
        for row in filter(None, (plan.exact_fit, plan.local_fit)):
            own = described(plan, row)
            names = ("method", "cuts", "recompute_units")
            net = localprop.localize(
                backbone(SWIN), batch_size=batch_size, reach=0, micro_batches=row.micro_batches,
                split_blocks=row.setting.split_blocks, **{name: own[name] for name in names},
            )  # fmt: skip
            step, kept = local_step(net, batch_size, "cpu", False, row.micro_batches)
            peak = peak_of(step, kept, "cpu")
            error = round(100 * (row.step.peak / peak - 1), 3)
            rows.append(own | {"budget": plan.budget, "measured": peak, "error_percent": error})
            print(own["setting"], share, peak <= int(share * whole), error, flush=True)
    return rows


def main() -> None:
    began = time.process_time()
    localprop.plan(backbone(SWIN), 128, budget=4 * 2**30, show="fronts")
    seconds = round(time.process_time() - began, 1)
    print(f"a plan with fronts and a budget takes {seconds} s of one core", flush=True)
    swin = fits(SWIN, 128, SHARES[SWIN])
    vit, away = (
        fits(VIT, 64, SHARES[VIT], amp_dtype=torch.bfloat16, device="cuda", offload=offload)
        for offload in (False, True)
    )
    predicted = [swin, vit, away | {"offload": True}]
    write_result("budget", {"plan_seconds": seconds, "predicted": predicted, "measured": measured()})


if __name__ == "__main__":
    main()
