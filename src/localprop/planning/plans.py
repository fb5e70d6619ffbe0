"""Predicts without a GPU and without data what each way to train a model needs, and which one fits a budget."""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from localprop.errors import ConfigError
from localprop.memory.cost import Costs
from localprop.memory.speed import MACHINES
from localprop.planning.peaks import Peak
from localprop.planning.planner import Planner, key
from localprop.planning.processes import Processes
from localprop.planning.rows import PlanRow, Setting, told_apart
from localprop.planning.schedules import Link
from localprop.planning.search.proposals import Proposed, proposals
from localprop.settings.bounds import require_equal_parts
from localprop.settings.config import OptimConfig
from localprop.settings.recipe import Recipe
from localprop.tracing.chains import chain

_NAMES = r"(end-to-end|halffrozen|(exact)?k=\d+).*"  # how the keys of settings begin
_OTHERS = ("num_classes", "task", "criterion", "mean", "std")  # arguments of `localize` that are no part of a recipe
MODULES: tuple[int | Literal["max"], ...] = (2, 4, 8)


@dataclass(frozen=True)
class Plan:
    """What training takes: a row per setting, end-to-end first.

    Attributes:
        rows: end-to-end training and the numbers of modules that were asked for, at one batch size.
        exact: exact settings from the one with the least memory to the fastest, none of which is beaten by another in
            both; end-to-end training is one. Empty where they were not asked for, or several processes were.
        local: likewise, of local modules.
        budget: bytes that the peak must stay below, where given.
        exact_fit: the fastest exact setting that fits the budget. It divides the batch into micro-batches, and takes
            another optimizer, only where nothing fits without. None if there is none, or no budget.
        local_fit: likewise, of local modules.
        divided_fit: end-to-end training in micro-batches, where that fits the budget and is faster than `exact_fit`;
            else None. Its gradients are the same up to rounding.
        frozen: settings of exact training with the first half frozen, likewise; empty unless that is proposed.
        frozen_fit: the fastest of these that fits the budget.
        proposed: what is proposed for a budget, in the order in which it is to be taken. For trained weights "frozen"
            is among them, and the first of the local modules is frozen, unless something else was asked for.
        choice: the first of these that fits: the local one where its method, number of modules, cuts, reach or finish
            was asked for; else in their order. One with the batch and the optimizer that were asked for comes first.
        pipeline: end-to-end training by 1F1B on as many processes as `PlanRow.parallel` has; None where that was not
            asked for, or cannot be.
        explained: why the peak of one setting is where it is; None where that was not asked for.
        left_out: why the model does not allow a setting that was asked for, by the setting's name.
    """

    rows: list[PlanRow]
    exact: list[PlanRow] = field(default_factory=list)
    local: list[PlanRow] = field(default_factory=list)
    budget: int | None = None
    exact_fit: PlanRow | None = None
    local_fit: PlanRow | None = None
    divided_fit: PlanRow | None = None
    choice: PlanRow | None = None
    pipeline: Processes | None = None
    explained: Peak | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    frozen: list[PlanRow] = field(default_factory=list)
    frozen_fit: PlanRow | None = None
    proposed: tuple[Proposed, ...] = ("exact", "local")

    @property
    def fits(self) -> dict[Proposed, PlanRow | None]:
        """Of all that is proposed for the budget, in order, what fits."""
        return {name: getattr(self, f"{name}_fit") for name in self.proposed}

    @property
    def fronts(self) -> dict[Proposed, list[PlanRow]]:
        """Of all that is proposed, in order, the settings that no other beats."""
        return {name: getattr(self, name) for name in self.proposed}

    @property
    def baseline(self) -> PlanRow:
        """Ordinary end-to-end training."""
        return self.rows[0]

    @property
    def typical(self) -> PlanRow:
        """The setting to show beside end-to-end: four modules, or the number next to that."""
        return min(self.rows[1:] or self.rows, key=lambda row: (row.setting.modules == 1, abs(row.setting.modules - 4)))

    def memory_ratio(self, row: PlanRow) -> float:
        """Peak memory against end-to-end."""
        return row.peak / self.baseline.peak

    def time_ratio(self, row: PlanRow) -> float:
        """Expected time per step against end-to-end."""
        return row.seconds / self.baseline.seconds

    def flops_ratio(self, row: PlanRow) -> float:
        """Floating point operations per step against end-to-end."""
        return row.flops / self.baseline.flops

    def speedup(self, row: PlanRow) -> float | None:
        """Expected throughput on several processes against the same modules in one."""
        return row.step.seconds / row.parallel.timing.seconds if row.parallel else None

    @property
    def pipeline_speedup(self) -> float | None:
        """Expected throughput of the pipeline against end-to-end training in one process."""
        return self.baseline.step.seconds / self.pipeline.timing.seconds if self.pipeline else None

    def against_pipeline(self, row: PlanRow) -> float | None:
        """Expected throughput on several processes against that of the pipeline on as many."""
        if row.parallel is None or self.pipeline is None:
            return None
        return self.pipeline.timing.seconds / row.parallel.timing.seconds


def plan(
    model: nn.Module,
    batch_size: int = 32,
    *,
    modules: Sequence[int | Literal["max"]] = MODULES,
    method: str = Recipe.method,
    input_size: tuple[int, int, int] | None = None,
    opt: OptimConfig | str = "adamw",
    micro_batches: int | None = None,
    amp_dtype: torch.dtype | None = None,
    budget: int | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    nproc: int | None = None,
    bandwidth: float | None = None,
    explain: str | None = None,
    finish: float = 0.0,
    show: Literal["rows", "fronts", "fits"] = "rows",
    offload: bool = True,
    trained: bool = False,
    on_setting: Callable[[Setting], None] | None = None,
    **options: Any,
) -> Plan:
    """Predicts what a training step takes: end-to-end, with activation checkpointing, and in K local modules.

    Each setting's step is run on fake tensors, optimizer included; the model is not changed. Predictions are compared
    with measurements in docs/memory.md.

    Args:
        model: any image model that `localize` takes.
        batch_size: images per step.
        modules: numbers of local modules; "max" is one per block, or per part of a split block. Numbers
            that the model does not allow are left out; the only one, or cuts, must be allowed.
        method: how the modules learn.
        input_size: (channels, height, width) of the images; default: what the model says of itself.
        opt: name of an optimizer, or all settings of the optimizer.
        micro_batches: equal parts of a batch, trained one after the other; default: as `opt` says, or one.
        amp_dtype: type of automatic mixed precision; default: none.
        budget: bytes; the plan then has the fastest exact and the fastest local setting that fit, and a `choice`.
        device: "cpu" or "cuda": whose kernels and speed to assume.
        nproc: number of processes that modules are to be shared out to. Each row then says what that takes, and the
            plan what a pipeline of end-to-end training takes.
        bandwidth: bytes per second between two processes; default: an order of magnitude for the device.
        explain: name of a setting, such as "K=4" or "end-to-end"; the plan then says why its peak is where it is.
        finish: part of the epochs of local modules, the last ones, in which the same modules are trained exactly. The
            peak of a row is then the larger one of both, and its time the mean.
        show: "rows", end-to-end training and the numbers of modules; "fronts", these and the fastest settings for any
            memory; or "fits", only end-to-end training and what fits the budget.
        offload: whether the fastest settings for CUDA may have boundaries and optimizer states on the host.
        trained: whether training starts from trained weights: then a plan also proposes to freeze a part of them.
        on_setting: called before each setting is looked at.
        options: further arguments of `localize`: settings of a `localprop.Recipe`, num_classes, criterion, ...

    Raises:
        ChainError, ConfigError: as `localize`.
        ParallelError: the processes cannot share any of the numbers of modules that were asked for.
        PlanError: memory cannot be predicted, or nothing fits the budget even with one image at a time.
    """
    _require_possible(batch_size, nproc, micro_batches, explain, budget)
    optim = opt if isinstance(opt, OptimConfig) else OptimConfig(opt=opt)
    optim = replace(optim, amp=amp_dtype is not None, micro_batches=micro_batches or optim.micro_batches)
    require_equal_parts(batch_size, optim.micro_batches)
    arguments = {name: options.pop(name) for name in _OTHERS if name in options}
    recipe, units = Recipe.of(method=method, **options), chain(model, input_size)
    if budget is not None and (recipe.grad_checkpointing or recipe.recompute_units):
        raise ConfigError("a budget chooses which units run again; leave out grad_checkpointing and recompute_units")
    link = Link(bandwidth or MACHINES[device].link)
    planner = Planner(
        model, {False: Costs(model, units)}, recipe, arguments, optim, amp_dtype, batch_size, device, nproc, link
    )
    planner.on_setting, planner.offload, planner.finish = on_setting or planner.on_setting, offload, finish
    if recipe.freeze_modules and (len(modules) == 1 or recipe.cuts is not None):
        planner.freeze_by_name(modules[0] if len(modules) == 1 and modules[0] != "max" else None)
    elif recipe.freeze_modules and budget is not None:
        raise ConfigError("a budget chooses modules, so freeze_modules needs their number too: say modules, or freeze")
    return _planned(planner, modules, budget, show, explain, trained)


def _require_possible(
    batch_size: int, nproc: int | None, micro_batches: int | None, explain: str | None, budget: int | None
) -> None:
    """Raises a ConfigError where an argument of `plan` is impossible in itself."""
    for name, value in (("batch_size", batch_size), ("nproc", nproc), ("micro_batches", micro_batches)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    if explain is not None and not re.fullmatch(_NAMES, key(explain)):
        raise ConfigError(f"explain is {explain!r}; give the name of a setting, such as end-to-end or K=4")
    if nproc and budget is not None:
        raise ConfigError("a budget chooses for one process; leave out either budget or nproc")


def _planned(
    planner: Planner,
    modules: Sequence[int | Literal["max"]],
    budget: int | None,
    show: Literal["rows", "fronts", "fits"],
    explain: str | None,
    trained: bool,
) -> Plan:
    """The plan of what a planner plans; see `plan`."""
    rows = planner.baselines() if show == "fits" else planner.rows(modules)
    proposed = proposals(planner, modules, [*rows], trained)
    fits, fronts = dict[Proposed, PlanRow | None](), dict[Proposed, list[PlanRow]]()
    choice = divided = None
    if budget is not None:
        fits = proposed.fitting(budget)
        choice, exact = proposed.chosen(fits, budget), fits["exact"]
        divided = proposed.finders["exact"].divided(budget, exact) if exact else None
    if show == "fronts" and not planner.nproc and not planner.recipe.freeze_modules:  # which names no units
        fronts = {name: proposed.front(name) for name in proposed.finders}
    found = [row for row in (*fits.values(), divided, choice) if row]
    apart = told_apart([*rows, *itertools.chain(*fronts.values()), *found])

    def fit(name: Proposed) -> PlanRow | None:
        row = fits.get(name)
        return row and apart[id(row)]

    def front(name: Proposed) -> list[PlanRow]:
        return [apart[id(row)] for row in fronts.get(name, [])]

    return Plan(
        rows,
        front("exact"),
        front("local"),
        budget,
        fit("exact"),
        fit("local"),
        divided and apart[id(divided)],
        choice and apart[id(choice)],
        planner.pipeline(rows) if planner.nproc else None,
        planner.explained(list(apart.values()), explain),
        planner.left_out,
        front("frozen"),
        fit("frozen"),
        tuple(proposed.finders),
    )
