"""Plans one setting after the other: which there are, and what each needs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from localprop.division.divide import division_of
from localprop.division.division import Division
from localprop.division.exactly import exactly
from localprop.division.partition import most_modules
from localprop.errors import ChainError, ConfigError, ParallelError
from localprop.memory.cost import Costs
from localprop.network.network import LocalNetwork
from localprop.planning.peaks import Peak, explain_peak
from localprop.planning.processes import Processes, pipeline, share_out
from localprop.planning.rows import Finish, PlanRow, Setting
from localprop.planning.schedules import Link
from localprop.planning.simulation import simulate_step
from localprop.settings.config import OptimConfig
from localprop.settings.recipe import Recipe
from localprop.tracing.chains import chain

_CLEARLY = 0.97


@dataclass
class Planner:
    """Plans settings of one model, with the same optimizer, batch and machine for all of them.

    Attributes:
        model: the model.
        costs: its chain and what is known of the chain's costs, by whether blocks are split.
        recipe: the settings that all numbers of modules have in common.
        arguments: further arguments of `localize`, which are no part of a recipe.
        optim: settings of the optimizer.
        amp_dtype: type of automatic mixed precision, if any.
        batch_size: images per step.
        device: whose kernels and speed to assume.
        nproc: number of processes that modules are shared out to, if any.
        link: between two processes.
        on_setting: called before each setting is looked at.
        offload: whether boundaries and optimizer states may rest on the host where nobody asked for it.
        must_fit: whether an error is raised for a setting that the model does not allow.
        left_out: why the model does not allow a setting, by the setting's name.
        finish: part of the epochs of local modules, the last ones, in which they are trained exactly.
    """

    model: nn.Module
    costs: dict[bool, Costs]
    recipe: Recipe
    arguments: dict[str, Any]
    optim: OptimConfig
    amp_dtype: torch.dtype | None
    batch_size: int
    device: str
    nproc: int | None
    link: Link
    on_setting: Callable[[Setting], None] = lambda setting: None
    offload: bool = True
    must_fit: bool = False
    left_out: dict[str, str] = field(default_factory=dict)
    finish: float = 0.0

    def rows(self, modules: Sequence[int | Literal["max"]]) -> list[PlanRow]:
        """End-to-end training, then the recipe with each number of modules."""
        return self.baselines() + self.divided(modules)

    def baselines(self) -> list[PlanRow]:
        """End-to-end training, plain and with activation checkpointing."""
        plain = Setting(Recipe(modules=1, method="end-to-end", freeze=self.recipe.freeze))
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
        split = self.recipe.split_blocks
        for count in modules:
            while True:
                setting = self.setting(count, split)
                known = any(row.setting == setting for row in rows)
                row = self.row(setting) if setting.modules > 1 and not known else None
                least = min((row.peak for row in rows), default=None)
                rows += [row] if row else []
                if split or not row or least is None or row.peak < _CLEARLY * least:
                    break
                if len(self.known(True).chain) == len(self.known(False).chain):
                    break
                split = True
        return rows

    def setting(self, count: int | Literal["max"], split: bool) -> Setting:
        """The recipe with a number of modules, of whole blocks or of their parts."""
        units = self.known(split).chain
        most = most_modules(units, range(1, len(units) + 1), self.recipe.min_depth)
        number = most if count == "max" else count
        return Setting(replace(self.recipe, modules=number, split_blocks=split), number == most)

    def known(self, split: bool) -> Costs:
        """The model's chain, of whole blocks or of their parts, and its costs so far."""
        if split not in self.costs:
            size = self.costs[not split].chain.input_size
            self.costs[split] = Costs(self.model, chain(self.model, size, split_blocks=split))
        return self.costs[split]

    def row(self, setting: Setting) -> PlanRow | None:
        """What a setting takes; None where the model does not have so many modules."""
        self.on_setting(setting)
        with _as_before(self.model):
            return self._row(setting)

    def _row(self, setting: Setting) -> PlanRow | None:
        divided = setting.modules > 1
        try:
            net, given = self.network(setting)
        except ChainError as error:
            if not divided or self.must_fit:
                raise
            self.left_out[setting.name] = str(error)
            return None
        step, parallel, not_parallel = simulate_step(net, *given), None, None
        if divided and self.nproc:
            try:
                parallel = share_out(net, step, *given, self.nproc, self.link)
            except (ParallelError, ConfigError) as error:
                if self.must_fit:
                    raise
                not_parallel = str(error)
        units = [module.units for module in net.local_modules]
        finish = None
        if self.finish and divided and not net.exact:
            finish = Finish(self.finish, simulate_step(exactly(net), *given))
        return PlanRow(setting, self.batch_size, given[0].micro_batches, step, units, parallel, not_parallel, finish)

    def network(self, setting: Setting) -> tuple[LocalNetwork, tuple[OptimConfig, int, tuple[int, int, int], str]]:
        """The network of a setting, and what else `simulate_step` is given."""
        optim = optim_of(setting, self.optim)
        division = self.division(setting.recipe, optim.micro_batches)
        with torch.random.fork_rng(devices=[]):  # weights of auxiliary nets are drawn
            net = division.build(division.ends())
        return net, (optim, self.batch_size, division.units.input_size, self.device)

    def division(self, recipe: Recipe, micro_batches: int) -> Division:
        """The backbone with everything settled but where to cut, with the batch in so many parts."""
        return division_of(
            self.model,
            recipe,
            self.known(recipe.split_blocks),
            batch_size=self.batch_size,
            micro_batches=micro_batches,
            amp_dtype=self.amp_dtype,
            device=self.device,
            **self.arguments,
        )

    def explained(self, rows: list[PlanRow], name: str | None) -> Peak | None:
        """Why the peak of the row with this name is where it is; None where no name is given.

        Raises:
            ConfigError: there is no such row.
        """
        if name is None:
            return None
        found = [row for row in rows if key(row.setting.name) == key(name)]
        found += [row for row in rows if key(row.setting.name.replace(", max", "")) == key(name)]
        if not found:
            known = ", ".join(row.setting.name for row in rows)
            raise ConfigError(f"this plan has no setting {name!r} to explain; it has {known}; --modules plans others")
        setting = found[0].setting
        self.on_setting(setting)
        with _as_before(self.model):
            net, given = self.network(setting)
            return explain_peak(setting.name, net, *given)

    def freeze_by_name(self, modules: int | None) -> None:
        """Names the units of the first modules that are to be frozen, with so many modules as they are usually cut.

        So they are the same in every setting, end-to-end training included.
        """
        own = replace(self.recipe, modules=modules)
        division = self.division(own, self.optim.micro_batches)
        names = [unit.name for unit in division.units[: division.ends()[own.freeze_modules - 1]]]
        self.recipe = replace(self.recipe, freeze=(*(self.recipe.freeze or ()), *names), freeze_modules=0)

    def trained_bytes(self) -> int:
        """Bytes of the weights that are trained in every setting."""
        units = self.known(False).chain
        frozen = {
            id(parameter)
            for i, unit in enumerate(units)
            if self.recipe.freezes(unit.name, i + 1 == len(units))
            for parameter in unit.used(self.model, nn.Module.parameters)
        }
        trained = (p for p in self.model.parameters() if p.requires_grad and id(p) not in frozen)
        return sum(p.numel() * p.element_size() for p in trained)

    def pipeline(self, rows: list[PlanRow]) -> Processes | None:
        """End-to-end training by 1F1B on as many processes as the rows' modules are shared out to.

        Raises:
            ParallelError: no row's modules can be shared out.
        """
        assert self.nproc
        if not (self.recipe.end_to_end or any(row.parallel for row in rows)):
            most = max(row.setting.modules for row in rows)
            raise ParallelError(
                f"{self.nproc} processes cannot share the {most} modules that there are at most; fewer --nproc"
            )
        known = self.known(False)
        return pipeline(known, self.optim, self.batch_size, self.device, self.amp_dtype, self.nproc, self.link)


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Afterwards what is trained of a model, and in training mode, is what is now."""
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for parameter, value in trained.items():
            parameter.requires_grad_(value)
        for module, mode in modes.items():
            module.training = mode


def optim_of(setting: Setting, asked: OptimConfig) -> OptimConfig:
    """The settings of a step that were asked for, with those that are the planner's choice."""
    return replace(
        asked,
        micro_batches=setting.micro_batches or asked.micro_batches,
        opt=setting.opt or asked.opt,
        offload_optimizer="optimizer" in setting.offload or asked.offload_optimizer,
        offload_boundaries="boundaries" in setting.offload or asked.offload_boundaries,
    )


def key(name: str) -> str:
    """What names of settings are compared by: "K=4+ckpt" is "K=4 + ckpt"."""
    return "".join(name.split()).lower()
