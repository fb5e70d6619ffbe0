"""What `localprop plan` says beside its tables: lines, and everything as JSON."""

from dataclasses import asdict
from typing import Any

from localprop.division.resolve import resolved
from localprop.planning.known import cost_in_accuracy
from localprop.planning.plans import Plan
from localprop.planning.processes import Processes
from localprop.planning.rows import Finish, PlanRow
from localprop.planning.settings import chosen_for_plan, train_command
from localprop.report.formats import format_bytes
from localprop.settings.flat import to_flat
from localprop.settings.plan import PlanConfig


def plan_lines(config: PlanConfig, result: Plan) -> list[str]:
    """What a plan comes to, in words."""
    lines = [f"picture: {config.picture}"] + ([f"everything: {config.json}"] if config.json else [])
    if result.budget is None:
        return lines
    limit = format_bytes(result.budget)
    for kind, row in (("exact", result.exact_fit), ("local", result.local_fit)):
        if row is None:
            lines += ["", f"within {limit}, {kind}: nothing"]
            continue
        peaks = [row.step.peak] + ([row.finish.step.peak] if row.finish else [])
        peak, ratio = ", in its finish ".join(map(format_bytes, peaks)), result.time_ratio(row)
        lines += ["", f"within {limit}, {kind}: {row.setting.name} takes {peak} and {ratio:.2f} of the time"]
        if kind == "local":
            lines.append(cost_in_accuracy(resolved(row.setting.recipe, config.device), config.local.finish))
        lines += [line for line in (changed_numbers(row), f"{_command(config, row)} --data folder:PATH") if line]
        if kind == "exact" and (divided := result.divided_fit):
            lines.append(f"{faster_divided(divided, row)}: {_command(config, divided)} --data folder:PATH")
    return lines


def _command(config: PlanConfig, row: PlanRow) -> str:
    return train_command(chosen_for_plan(config, row))


def changed_numbers(row: PlanRow) -> str:
    """What is not as it was asked for and changes numbers, as a sentence; empty where nothing is."""
    parts, opt = row.setting.micro_batches, row.setting.opt
    found = [f"{parts} micro-batches add gradients up in another order"] if parts else []
    found += [f"{opt} rounds its states to 8 bits, which is other training"] if opt else []
    return f"nothing fits otherwise: {', and '.join(found)}" if found else ""


def faster_divided(row: PlanRow, other: PlanRow) -> str:
    """What micro-batches would bring against another setting, as a sentence."""
    ratio = row.step.seconds / other.step.seconds
    return f"{row.setting.name}, whose gradients are the same up to rounding, takes {ratio:.2f} of its time"


def plan_report(config: PlanConfig, result: Plan) -> dict[str, Any]:
    """Everything that a plan says, for a JSON file; memory in bytes."""

    def describe(row: PlanRow) -> dict[str, Any]:
        return {
            **row.setting.described(),
            "batch_size": row.batch_size,
            "micro_batches": row.micro_batches,
            "peak": row.step.peak,
            **row.step.parts,
            "peak_module": row.step.module + 1,
            "memory_ratio": result.memory_ratio(row),
            "flops": row.step.flops,
            "flops_ratio": result.flops_ratio(row),
            "time_ratio": result.time_ratio(row),
            "module_units": row.module_units,
            **({"finish": finish(row.finish)} if row.finish else {}),
        }

    def finish(own: Finish) -> dict[str, Any]:
        return {"part": own.part, "peak": own.step.peak, **own.step.parts, "flops": own.step.flops}

    def fitting(row: PlanRow) -> dict[str, Any]:
        return {**describe(row), "command": _command(config, row)}

    report: dict[str, Any] = {
        "config": to_flat(config),
        **{name: [describe(row) for row in getattr(result, name)] for name in ("rows", "exact", "local")},
    }
    if config.parallel:
        for row, described in zip(result.rows, report["rows"], strict=True):
            described["parallel"] = _describe_processes(row.parallel, result.speedup(row))
            if row.not_parallel:
                described["not_parallel"] = row.not_parallel
        report["pipeline"] = _describe_processes(result.pipeline, result.pipeline_speedup)
    if result.left_out:
        report["left_out"] = result.left_out
    if result.explained:
        report["explained"] = {**asdict(result.explained), "module": result.explained.module + 1}
    if result.choice is not None:
        names = ("exact_fit", "local_fit", "divided_fit", "choice")
        found = {name: getattr(result, name) for name in names}
        report |= {"budget": result.budget, **{name: row and fitting(row) for name, row in found.items()}}
    return report


def _describe_processes(processes: Processes | None, speedup: float | None) -> dict[str, Any] | None:
    if processes is None:
        return None
    timing = processes.timing
    return {
        "ranks": [
            {"modules": [k + 1 for k in modules], "units": units, "peak": peak, "waiting": waiting}
            for modules, units, peak, waiting in zip(
                processes.ranks, processes.units, processes.peaks, timing.waiting, strict=True
            )
        ],
        "micro_batches": processes.micro_batches,
        "replicas": processes.replicas,
        "bottleneck": timing.bottleneck,
        "expected_seconds": timing.seconds,
        "speedup": speedup,
    }
