"""Tells before training, without a GPU and without data, what each way to train a model takes, and which one fits."""

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from localprop.division.divide import divide
from localprop.division.partition import most_modules
from localprop.errors import ChainError, ConfigError, ParallelError, PlanError
from localprop.memory.cost import Costs
from localprop.memory.tracker import MACHINES
from localprop.methods import only_modules
from localprop.network.network import LocalNetwork
from localprop.planning.peaks import Peak, explain_peak
from localprop.planning.processes import Processes, pipeline, share_out
from localprop.planning.schedules import Link
from localprop.planning.simulation import simulate_step
from localprop.planning.steps import PredictedStep
from localprop.settings.config import OptimConfig, require_equal_parts
from localprop.settings.recipe import Recipe
from localprop.tracing.chains import chain
from localprop.tracing.units import Chain

_CLEARLY = 0.97
_NAMES = r"(end-to-end|(exact)?k=\d+).*"  # how the keys of settings begin
_OTHERS = ("num_classes", "task", "criterion", "mean", "std")  # arguments of `localize` that are no part of a recipe
MODULES: tuple[int | Literal["max"], ...] = (2, 3, 4, 6, 8, "max")


@dataclass(frozen=True)
class Setting:
    """One way to train a model.

    Attributes:
        recipe: what the network is made of, with a number of modules.
        largest: whether there cannot be more modules.
    """

    recipe: Recipe
    largest: bool = False

    @property
    def modules(self) -> int:
        """Number of modules, K; the baseline is end-to-end training with one."""
        return self.recipe.modules or 1

    @property
    def method(self) -> str:
        """How modules learn."""
        return self.recipe.method

    @property
    def split_blocks(self) -> bool:
        """Whether units are parts of blocks."""
        return self.recipe.split_blocks

    @property
    def grad_checkpointing(self) -> bool:
        """Whether units are run again in backward."""
        return self.recipe.grad_checkpointing

    @property
    def name(self) -> str:
        """For a table."""
        words = ["end-to-end" if self.modules == 1 else f"{'exact ' if self.recipe.end_to_end else ''}K={self.modules}"]
        words += ["split"] if self.split_blocks else []
        words += ["max"] if self.largest else []
        return ", ".join(words) + (" + ckpt" if self.grad_checkpointing else "")

    def described(self) -> dict[str, Any]:
        """Name and settings, for a JSON file. A setting that is not there is off."""
        keys = ("modules", "method", "split_blocks", "grad_checkpointing", "largest")
        return {"setting": self.name, **{key: getattr(self, key) for key in keys}}


@dataclass(frozen=True)
class PlanRow:
    """What one setting takes.

    Attributes:
        setting: the setting.
        batch_size: images per step.
        micro_batches: parts of that which go through the modules one after the other.
        step: memory and time of one step.
        module_units: names of each module's units.
        parallel: the same on several processes; None where that was not asked for, or cannot be.
        not_parallel: why it cannot be.
    """

    setting: Setting
    batch_size: int
    micro_batches: int
    step: PredictedStep
    module_units: list[list[str]] = field(repr=False)
    parallel: Processes | None = None
    not_parallel: str | None = None

    @property
    def trace(self) -> PredictedStep:
        """The old name of `step`; it stays for one version."""
        warnings.warn("PlanRow.trace has a new name: PlanRow.step", DeprecationWarning, stacklevel=2)
        return self.step


@dataclass(frozen=True)
class Plan:
    """What training takes: a row per setting, end-to-end first.

    Attributes:
        rows: the settings, at one batch size.
        budget: bytes that the peak must stay below, where given.
        choice: the setting that fits the budget, or else does with the fewest micro-batches; None without a budget.
        pipeline: end-to-end training by 1F1B on as many processes as `PlanRow.parallel` has; None where that was not
            asked for, or cannot be.
        explained: why the peak of one setting is where it is; None where that was not asked for.
        left_out: why the model does not allow a setting that was asked for, by the setting's name.
    """

    rows: list[PlanRow]
    budget: int | None = None
    choice: PlanRow | None = None
    pipeline: Processes | None = None
    explained: Peak | None = None
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def baseline(self) -> PlanRow:
        """Ordinary end-to-end training."""
        return self.rows[0]

    @property
    def typical(self) -> PlanRow:
        """The setting to show beside end-to-end: four modules, or the number next to that."""
        return min(self.rows[1:], key=lambda row: (row.setting.modules == 1, abs(row.setting.modules - 4)))

    def memory_ratio(self, row: PlanRow) -> float:
        """Peak memory against end-to-end."""
        return row.step.peak / self.baseline.step.peak

    def time_ratio(self, row: PlanRow) -> float:
        """Expected time per step against end-to-end."""
        return row.step.seconds / self.baseline.step.seconds

    def flops_ratio(self, row: PlanRow) -> float:
        """Floating point operations per step against end-to-end."""
        return row.step.flops / self.baseline.step.flops

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
        micro_batches: equal parts of a batch that go through the modules one after the other; default: as `opt` says,
            or one.
        amp_dtype: type of automatic mixed precision; default: none.
        budget: bytes; the plan then has a `choice`, among local modules only where just one number of them, or cuts,
            are asked for.
        device: "cpu" or "cuda": whose kernels and speed to assume.
        nproc: number of processes that modules are to be shared out to. Each row then says what that takes, and the
            plan what a pipeline of end-to-end training takes.
        bandwidth: bytes per second between two processes; default: an order of magnitude for the device.
        explain: name of a setting, such as "K=4" or "end-to-end"; the plan then says why its peak is where it is.
        on_setting: called before each setting is looked at.
        options: further arguments of `localize`: settings of a `localprop.Recipe`, num_classes, criterion, ...

    Raises:
        ChainError, ConfigError: as `localize`.
        ParallelError: the processes cannot share any of the numbers of modules that were asked for.
        PlanError: memory cannot be predicted, or nothing fits the budget even with one image at a time.
    """
    for name, value in (("batch_size", batch_size), ("nproc", nproc), ("micro_batches", micro_batches)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    if explain is not None and not re.fullmatch(_NAMES, _key(explain)):
        raise ConfigError(f"explain is {explain!r}; give the name of a setting, such as end-to-end or K=4")
    if nproc and budget is not None:
        raise ConfigError("a budget chooses for one process; leave out either budget or nproc")
    optim = opt if isinstance(opt, OptimConfig) else OptimConfig(opt=opt)
    optim = replace(optim, amp=amp_dtype is not None, micro_batches=micro_batches or optim.micro_batches)
    require_equal_parts(batch_size, optim.micro_batches)
    others: dict[str, Any] = {name: options.pop(name) for name in _OTHERS if name in options}
    recipe, units = Recipe.of(method=method, **options), chain(model, input_size)
    planner = _Planner(model, units, optim, amp_dtype, batch_size, device, recipe, others, on_setting)
    planner.processes, planner.link = nproc, Link(bandwidth or MACHINES[device].link)
    rows = planner.baselines()
    divided = only_modules(method) != 1
    if divided:
        rows += planner.divided(modules)
    if nproc:
        if divided and not any(row.parallel for row in rows):
            most = max(row.setting.modules for row in rows)
            raise ParallelError(
                f"{nproc} processes cannot share the {most} modules that there are at most; fewer --nproc"
            )
        other = pipeline(planner.known(False), optim, batch_size, device, amp_dtype, nproc, planner.link)
        return Plan(rows, pipeline=other, explained=planner.explained(rows, explain), left_out=planner.left_out)
    if budget is None:
        return Plan(rows, explained=planner.explained(rows, explain), left_out=planner.left_out)
    # Who names a number of modules, or cuts, wants these.
    named = divided and (len(modules) == 1 or recipe.cuts is not None)
    candidates = [row for row in rows if row.setting.modules > 1] if named else rows
    choice = planner.choose(Plan(rows), candidates, budget)
    return Plan(rows, budget, choice, explained=planner.explained(rows, explain), left_out=planner.left_out)


class _Planner:
    """A model with everything settled but the setting."""

    def __init__(
        self,
        model: nn.Module,
        units: Chain,
        optim: OptimConfig,
        amp_dtype: torch.dtype | None,
        batch_size: int,
        device: str,
        recipe: Recipe,
        options: dict[str, Any],
        on_setting: Callable[[Setting], None] | None,
    ) -> None:
        self.model, self.optim, self.amp_dtype, self.device = model, optim, amp_dtype, device
        self.batch_size = batch_size
        self.recipe, self.options = recipe, options
        self.costs = {False: Costs(model, units)}
        self.must_fit = False
        self.left_out: dict[str, str] = {}
        self.processes: int | None = None
        self.link = Link()
        self.on_setting = on_setting or (lambda setting: None)

    def baselines(self) -> list[PlanRow]:
        """End-to-end training, plain and with activation checkpointing."""
        plain = Setting(Recipe(modules=1, method="end-to-end"))
        again = Setting(replace(plain.recipe, grad_checkpointing=True))
        rows = [self.row(setting) for setting in (plain, again)]
        return [row for row in rows if row]

    def divided(self, modules: Sequence[int | Literal["max"]]) -> list[PlanRow]:
        """The recipe with each number of modules.

        Where more modules of whole blocks save nothing any more, the largest block is what is left: from there on
        blocks are split.
        """
        rows: list[PlanRow] = []
        self.must_fit = len(modules) == 1 or self.recipe.cuts is not None
        split, depth = self.recipe.split_blocks, self.recipe.min_depth
        for count in modules:
            while True:
                units = self.known(split).chain
                most = most_modules(units, range(1, len(units) + 1), depth)
                number = most if count == "max" else count
                setting = Setting(replace(self.recipe, modules=number, split_blocks=split), number == most)
                known = any(row.setting == setting for row in rows)
                row = self.row(setting) if number > 1 and not known else None
                least = min((row.step.peak for row in rows), default=None)
                rows += [row] if row else []
                if split or not row or least is None or row.step.peak < _CLEARLY * least:
                    break
                if len(self.known(True).chain) == len(self.known(False).chain):
                    break
                split = True
        return rows

    def known(self, split: bool) -> Costs:
        """The model's chain, of whole blocks or of their parts, and its costs so far."""
        if split not in self.costs:
            size = self.costs[not split].chain.input_size
            self.costs[split] = Costs(self.model, chain(self.model, size, split_blocks=split))
        return self.costs[split]

    def row(self, setting: Setting, micro_batches: int | None = None) -> PlanRow | None:
        """What a setting takes; None where the model does not have so many modules.

        Args:
            setting: the setting.
            micro_batches: into which the batch is divided; default: as planned for.
        """
        self.on_setting(setting)
        local = setting.modules > 1
        try:
            net, given = self.network(setting, micro_batches)
        except ChainError as error:
            if not local or self.must_fit:
                raise
            self.left_out[setting.name] = str(error)
            return None
        step, parallel, not_parallel = simulate_step(net, *given), None, None
        if local and self.processes:
            try:
                parallel = share_out(net, step, *given, self.processes, self.link)
            except (ParallelError, ConfigError) as error:
                if self.must_fit:
                    raise
                not_parallel = str(error)
        units = [module.units for module in net.local_modules]
        return PlanRow(setting, self.batch_size, given[0].micro_batches, step, units, parallel, not_parallel)

    def network(
        self, setting: Setting, micro_batches: int | None = None
    ) -> tuple[LocalNetwork, tuple[OptimConfig, int, tuple[int, int, int], str]]:
        """The network of a setting, and what else `simulate_step` is given; arguments as of `row`."""
        optim = replace(self.optim, micro_batches=micro_batches or self.optim.micro_batches)
        costs = self.known(setting.split_blocks)
        with torch.random.fork_rng(devices=[]):  # weights of auxiliary nets are drawn
            net = divide(
                self.model,
                setting.recipe,
                costs,
                batch_size=self.batch_size,
                micro_batches=optim.micro_batches,
                amp_dtype=self.amp_dtype,
                device=self.device,
                **self.options,
            )
        return net, (optim, self.batch_size, costs.chain.input_size, self.device)

    def explained(self, rows: list[PlanRow], name: str | None) -> Peak | None:
        """Why the peak of the row with this name is where it is; None where no name is given.

        Raises:
            ConfigError: there is no such row.
        """
        if name is None:
            return None
        found = [row for row in rows if _key(row.setting.name) == _key(name)]
        found += [row for row in rows if _key(row.setting.name.replace(", max", "")) == _key(name)]
        if not found:
            known = ", ".join(row.setting.name for row in rows)
            raise ConfigError(f"this plan has no setting {name!r} to explain; it has {known}; --modules plans others")
        setting = found[0].setting
        self.on_setting(setting)
        net, given = self.network(setting, found[0].micro_batches)
        return explain_peak(setting.name, net, *given)

    def choose(self, plan: Plan, rows: list[PlanRow], budget: int) -> PlanRow:
        """The one of some rows of a plan that fits: the fastest, and of equally fast ones that with the fewest modules.

        Where none fits, the one that does with the fewest micro-batches.
        """
        fitting = [row for row in rows if row.step.peak <= budget]
        if fitting:
            # Expected times that differ by less than a tenth are equal, as far as can be told.
            return min(fitting, key=lambda row: (round(plan.time_ratio(row), 1), row.setting.modules))
        # With few images at once weights, their gradients and optimizer state decide, of which local modules have more.
        smallest = min(rows, key=lambda row: row.step.peak)
        leanest = min(rows, key=lambda row: (row.step.parts["parameters"], row.step.peak))
        found, first = smallest, self.optim.micro_batches + 1
        candidates = [smallest] if smallest is leanest else [smallest, leanest]
        for count in (n for n in range(first, self.batch_size + 1) if self.batch_size % n == 0):
            tried = [self.row(row.setting, count) for row in candidates]
            found = min((row for row in tried if row), key=lambda row: row.step.peak)
            if found.step.peak <= budget:
                return found
        raise PlanError(
            f"nothing fits {budget / 2**20:.0f} MiB: {found.setting.name} with 1 image at a time takes "
            f"{found.step.peak / 2**20:.0f} MiB; choose a smaller model or smaller images, or raise --budget"
        )


def _key(name: str) -> str:
    """What names of settings are compared by: "K=4+ckpt" is "K=4 + ckpt"."""
    return "".join(name.split()).lower()
