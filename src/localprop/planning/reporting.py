"""What `localprop plan` says beside its tables: lines, and everything as JSON; and what `train --budget` says."""

from dataclasses import asdict
from typing import Any

from localprop.division.resolve import resolved
from localprop.planning.known import cost_in_accuracy
from localprop.planning.plans import Plan
from localprop.planning.processes import Processes
from localprop.planning.rows import Finish, PlanRow
from localprop.planning.search.proposals import Proposed
from localprop.planning.settings import chosen_for_plan, train_command
from localprop.report.formats import format_bytes
from localprop.settings.flat import to_flat
from localprop.settings.plan import PlanConfig
from localprop.settings.rates import fine_tunes

_PLACES: dict[Proposed, str] = {"exact": "first", "frozen": "next", "local": "last"}


def plan_lines(config: PlanConfig, result: Plan) -> list[str]:
    """What a plan comes to, in words."""
    lines = [f"picture: {config.picture}"] + ([f"everything: {config.json}"] if config.json else [])
    if result.budget is None:
        return lines
    limit, trained = format_bytes(result.budget), fine_tunes(config.backbone)
    for name, row in result.fits.items():
        if row is None:
            lines += ["", f"within {limit}, {title(name, result)}: nothing"]
            continue
        peaks = [row.step.peak] + ([row.finish.step.peak] if row.finish else [])
        peak, ratio = ", in its finish ".join(map(format_bytes, peaks)), result.time_ratio(row)
        lines += [
            "",
            f"within {limit}, {title(name, result)}: {row.setting.name} takes {peak} and {ratio:.2f} of the time",
        ]
        if name != "exact" or trained:
            told = reason(row, config.device, config.local.finish, trained)
            ordered = "frozen" in result.proposed and (name != "local" or row.setting.frozen)
            lines.append(f"{_PLACES[name]}, since {told}" if ordered else told)
        lines += [line for line in (changed_numbers(row), f"{_command(config, row)} --data folder:PATH") if line]
        if name == "exact" and (divided := result.divided_fit):
            lines.append(f"{faster_divided(divided, row)}: {_command(config, divided)} --data folder:PATH")
    return lines + order_lines(result)


def title(name: Proposed, result: Plan) -> str:
    """What is proposed, for a heading."""
    row = next((row for row in (result.fits[name], *result.fronts[name]) if row), None)
    first = row is not None and row.setting.frozen == "first"
    return {"exact": "exact", "frozen": "first half frozen", "local": "local" + first * ", first module frozen"}[name]


def reason(row: PlanRow, device: str, finish: float, trained: bool) -> str:
    """What a proposal leaves as it is, and what it is known to cost in accuracy, as a sentence."""
    frozen = row.setting.frozen
    accuracy = cost_in_accuracy(resolved(row.setting.recipe, device), finish, trained, frozen)
    if frozen == "half":
        return f"the first half keeps what it has learned, and the rest is trained exactly; {accuracy}"
    if frozen == "first":
        first = (
            "the first module keeps what it has learned, and the others before the last learn from losses of their own"
        )
        return f"{first}; {accuracy}"
    return accuracy


def order_lines(result: Plan) -> list[str]:
    """Where something is faster than what is proposed before it, a line on that."""
    rows = [row for row in result.fits.values() if row]
    if "frozen" not in result.proposed or not rows or result.choice is not rows[0]:
        return []
    faster = [row for row in rows[1:] if row.seconds < rows[0].seconds]
    if not faster:
        return []
    names = " and ".join(f"{row.setting.name} ({row.seconds / rows[0].seconds:.2f} of its time)" for row in faster)
    return ["", f"the order is that of accuracy, not of time: {rows[0].setting.name} comes before {names}"]


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
        "rows": [describe(row) for row in result.rows],
        **{name: [describe(row) for row in rows] for name, rows in result.fronts.items()},
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
        found = {f"{name}_fit": row for name, row in result.fits.items()}
        found |= {"divided_fit": result.divided_fit, "choice": result.choice}
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
