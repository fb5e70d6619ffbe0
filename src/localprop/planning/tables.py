"""What a plan prints: a table of settings, one of processes, and one that explains a peak."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from localprop.errors import printable
from localprop.parallel.placement import numbers as module_numbers
from localprop.planning.peaks import Peak
from localprop.planning.plans import Plan
from localprop.planning.processes import Processes
from localprop.planning.rows import PlanRow
from localprop.planning.search.proposals import SHORT
from localprop.report.formats import format_bytes

_HEADINGS = {
    "parameters": "param", "optimizer": "optim", "gradients": "grads", "activations": "activ", "temporaries": "temp"
}  # fmt: skip


def plan_table(plan: Plan, title: str) -> RenderableType:
    """A line per setting: its peak and the peak's parts, and time and operations against end-to-end."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("setting", no_wrap=True)
    for name in ("peak", "%", *_HEADINGS.values(), "FLOPs", "time", "in"):
        table.add_column(name, justify="right", no_wrap=True)
    fits = plan.fits.values()

    def add(row: PlanRow) -> None:
        style = "bold" if any(fit is not None and fit.setting == row.setting for fit in fits) else None
        lines = [(f"{row.setting.name} ", row.step)] + ([("  its finish ", row.finish.step)] if row.finish else [])
        whole = plan.baseline.step
        for name, step in lines:
            table.add_row(
                Text(name),
                f"{step.peak / 2**20:.0f}",
                f"{100 * step.peak / whole.peak:.0f}",
                *(f"{step.parts[part] / 2**20:.0f}" for part in _HEADINGS),
                f"{step.flops / whole.flops:.2f}",
                f"{step.seconds / whole.seconds:.2f}",
                str(step.module + 1) if len(row.module_units) > 1 else "",
                style=style,
            )

    for row in plan.rows:
        add(row)
    for name, front in plan.fronts.items():
        for i, row in enumerate(row for row in front if row not in plan.rows):
            if i == 0:
                table.add_row(f"{SHORT[name]}, the fastest", style="dim")
            add(row)
    heading = Text(
        f"{title}\npredicted peak of a training step: MiB, % of end-to-end, its parts, its module", style="dim"
    )
    parts: list[RenderableType] = [heading, table]
    if plan.exact or plan.local:
        text = "the fastest: cuts and recomputation are fitted; + ckpt 3: three units run again in backward"
        text += "\nhalf frozen: the first half is not trained; 1 frozen: the first module" if plan.frozen else ""
        parts.append(Text(text, style="dim"))
    if plan.left_out:
        parts.append(Text(f"left out, since the model has too few blocks: {', '.join(plan.left_out)}", style="dim"))
    return Group(*parts)


def processes_table(plan: Plan) -> RenderableType:
    """A line per setting that fits several processes, and one for 1F1B: layout, memory, bottleneck and throughput."""
    table = Table(box=None, padding=(0, 1, 0, 1), pad_edge=False)
    table.add_column("setting", no_wrap=True)
    table.add_column("modules", overflow="fold")  # the only one that gives way
    for name in ("peak", "in", "busiest", "waits", "faster", "1F1B = 1"):
        table.add_column(name, justify="right", no_wrap=True)

    def add(name: str, own: Processes, faster: float | None, against: float | None) -> None:
        table.add_row(
            Text(name),
            " | ".join(map(module_numbers, own.ranks)) + (f" x{own.replicas}" if own.replicas > 1 else ""),
            f"{own.peaks[own.largest] / 2**20:.0f}",
            str(own.largest),
            own.timing.bottleneck,
            f"{100 * min(own.timing.waiting):.0f}-{100 * max(own.timing.waiting):.0f}%",
            f"{faster:.2f}x",
            "" if against is None else f"{against:.2f}x",
        )

    for row in plan.rows:
        if row.parallel:
            add(row.setting.name, row.parallel, plan.speedup(row), plan.against_pipeline(row))
    if plan.pipeline:
        add(f"1F1B, {plan.pipeline.micro_batches} micro-batches", plan.pipeline, plan.pipeline_speedup, 1.0)
    text = (
        "\non several processes: each rank's modules (or stages), MiB of the largest rank,\n"
        "its number, what is busiest, time that ranks wait, and throughput against one\n"
        "process and against 1F1B"
    )
    reasons = [f"{row.setting.name}: {row.not_parallel}" for row in plan.rows if row.not_parallel]
    if not plan.pipeline:
        reasons.append("1F1B: left out; it needs a unit of the model and an image of the batch for each process")
    return Group(Text(text, style="dim"), table, *(Text(reason, style="dim") for reason in reasons))


_PHASES = {
    "forward": "in the forward of",
    "backward": "in the backward of",
    "recomputation": "in backward, where a forward runs again, that of",
    "optimizer step": "in the optimizer's step",
    "moving average": "in the update of the moving average",
}
# What `Rest` has, for one and for several.
_RESTS = {
    "parameters": ("weight or buffer", "weights and buffers"),
    "optimizer": ("optimizer state", "optimizer states"),
    "gradients": ("gradient of a weight", "gradients of weights"),
    "activations": ("other activation", "other activations"),
    "temporaries": ("other temporary", "other temporaries"),
}


def peak_table(peak: Peak) -> RenderableType:
    """Why a peak is where it is: the moment, and what is alive then, a line for each of the largest tensors."""
    table = Table(box=None, padding=(0, 1, 0, 1), pad_edge=False)
    table.add_column("made by", overflow="fold")
    table.add_column("shape", no_wrap=True)
    table.add_column("type", no_wrap=True)
    table.add_column("MiB", justify="right", no_wrap=True)
    table.add_column("%", justify="right", no_wrap=True)
    table.add_column("use", no_wrap=True)
    shares, others = percentages([tensor.size for tensor in peak.tensors], [rest.size for rest in peak.rest])
    for tensor, share in zip(peak.tensors, shares, strict=True):
        shape = "x".join(map(str, tensor.shape)) if tensor.dtype else "workspace"
        size = _mebibytes(tensor.size, peak.size)
        table.add_row(Text(printable(tensor.layer or "-")), shape, tensor.dtype, size, share, _HEADINGS[tensor.use])
    for rest, share in zip(peak.rest, others, strict=True):
        what = f"{rest.count} {_RESTS[rest.use][rest.count > 1]}"
        table.add_row(what, "", "", _mebibytes(rest.size, peak.size), share, _HEADINGS[rest.use], style="dim")
    table.add_row("in all", "", "", _mebibytes(peak.size, peak.size), "100.0", "", style="bold")
    parts: list[RenderableType] = [Text(peak_line(peak)), Text(), table]
    if any(kind.count > 1 for kind in peak.kinds):
        parts += [
            Text("\nactivations and temporaries by kind of layer, all blocks together", style="dim"),
            _kinds(peak),
        ]
    return Group(*parts)


def _kinds(peak: Peak) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 1), pad_edge=False)
    table.add_column("made by", overflow="fold")
    for name in ("tensors", "MiB", "%"):
        table.add_column(name, justify="right", no_wrap=True)
    for kind in peak.kinds:
        numbers = (str(kind.count), _mebibytes(kind.size, peak.size), f"{100 * kind.size / peak.size:.1f}")
        table.add_row(Text(printable(kind.layers)), *numbers)
    return table


def peak_line(peak: Peak) -> str:
    """The moment of a peak, in words."""
    places = [f"module {peak.module + 1} of {peak.modules}"] if peak.modules > 1 else []
    places += [f"micro-batch {peak.micro_batch} of {peak.micro_batches}"] if peak.micro_batch else []
    layer = f" {printable(peak.layer or 'no layer')}" if peak.phase in ("forward", "backward", "recomputation") else ""
    where = ", ".join([*places, f"{_PHASES[peak.phase]}{layer}"])
    return f"{peak.setting} is at its peak of {format_bytes(peak.size)}: {where}"


def percentages(sizes: Sequence[int], rest: Sequence[int]) -> tuple[list[str], list[str]]:
    """The shares of sizes and of the rest in their sum, in percent with one digit.

    They sum to 100.0: what rounding leaves over is spread over the largest of the rest, a tenth each. So equal sizes
    have equal shares.
    """
    whole = sum(sizes) + sum(rest)
    rounded = [round(1000 * size / whole) for size in [*sizes, *rest]]
    left = 1000 - sum(rounded)
    by_size = sorted(range(len(rest)), key=rest.__getitem__, reverse=True)
    large = [len(sizes) + i for i in by_size if rest[i] > whole / 100] or [len(sizes) + by_size[0]]
    for i in range(abs(left)):
        rounded[large[i % len(large)]] += 1 if left > 0 else -1
    texts = [f"{share / 10:.1f}" for share in rounded]
    return texts[: len(sizes)], texts[len(sizes) :]


def _mebibytes(size: int, largest: int) -> str:
    """Bytes in MiB, with as many digits as a table needs in which the largest number is this."""
    return f"{size / 2**20:,.{1 if largest >= 100 * 2**20 else 3}f}"
