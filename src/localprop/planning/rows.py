"""The rows of a plan: one way to train a model, and what that needs."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from localprop.errors import warn_renamed
from localprop.planning.processes import Processes
from localprop.planning.steps import PredictedStep
from localprop.settings.recipe import Frozen, Recipe

Offloaded = Literal["optimizer", "boundaries"]
"""What may rest on the host: optimizer states, and what exact training keeps between modules."""


@dataclass(frozen=True)
class Setting:
    """One way to train a model.

    Attributes:
        recipe: what the network is made of, with a number of modules.
        largest: whether there cannot be more modules.
        again: how many units run again in backward, where that and the cuts are the planner's choice; else None.
        micro_batches: into which the batch is divided, where that is the planner's choice; else None.
        opt: the optimizer, likewise.
        offload: what rests on the host, though nobody asked for it.
        frozen: what is frozen, though nobody asked for it.
        number: which of a plan's settings with the same name it is.
    """

    recipe: Recipe
    largest: bool = False
    again: int | None = None
    micro_batches: int | None = None
    opt: str | None = None
    offload: tuple[Offloaded, ...] = ()
    frozen: Frozen = ""
    number: int = field(default=1, compare=False)

    @property
    def modules(self) -> int:
        """Number of modules, K; the baseline is end-to-end training with one."""
        return self.recipe.count or 1

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
        kind = "half frozen" if self.frozen == "half" else "exact" if self.recipe.end_to_end else ""
        words = [f"{kind} K={self.modules}".lstrip()]
        if self.modules == 1:
            words = ["half frozen" if self.frozen else "end-to-end"]
        elif self.frozen == "first":
            words[0] += ", 1 frozen"
        if self.again is not None:
            name = words[0] + (f" + ckpt {self.again}" if self.again else ", fitted")
        else:
            words += ["split"] if self.split_blocks else []
            words += ["max"] if self.largest else []
            name = ", ".join(words) + (" + ckpt" if self.grad_checkpointing else "")
        name += f" ({self.number})" if self.number > 1 else ""
        name += f" in {self.micro_batches} micro-batches" if self.micro_batches else ""
        return name + (f", {self.opt}" if self.opt else "") + (", offload" if self.offload else "")

    @property
    def same_numbers(self) -> bool:
        """Whether it trains with the optimizer that was asked for, on the whole batch at once."""
        return self.micro_batches is None and self.opt is None

    def described(self) -> dict[str, Any]:
        """Name and settings, for a JSON file. A setting that is not there is off."""
        keys = ("modules", "method", "split_blocks", "grad_checkpointing", "largest")
        found = {name: getattr(self.recipe, name) for name in ("cuts", "recompute_units", "freeze", "freeze_modules")}
        found |= {"opt": self.opt, **{f"offload_{what}": True for what in self.offload}}
        found = {name: value for name, value in found.items() if value}
        return {"setting": self.name, **{key: getattr(self, key) for key in keys}, **found}


class Finish(NamedTuple):
    """The last epochs of a run of local modules, which train the same modules exactly.

    Attributes:
        part: of all epochs.
        step: memory and time of one step in them.
    """

    part: float
    step: PredictedStep


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
        finish: the same in the finish of a run of local modules; None without one.
    """

    setting: Setting
    batch_size: int
    micro_batches: int
    step: PredictedStep
    module_units: list[list[str]] = field(repr=False)
    parallel: Processes | None = None
    not_parallel: str | None = None
    finish: Finish | None = None

    @property
    def peak(self) -> int:
        """Bytes at the peak of a run: the larger one of its step and of that in its finish."""
        return max(self.step.peak, self.finish.step.peak if self.finish else 0)

    @property
    def seconds(self) -> float:
        """Expected time of a step, the mean over a run."""
        return self._mean(self.step.seconds, self.finish.step.seconds if self.finish else 0.0)

    @property
    def flops(self) -> float:
        """Floating point operations of a step, likewise."""
        return self._mean(self.step.flops, self.finish.step.flops if self.finish else 0.0)

    def _mean(self, before: float, after: float) -> float:
        return before + self.finish.part * (after - before) if self.finish else before

    @property
    def trace(self) -> PredictedStep:
        """The old name of `step`; it stays for one version."""
        warn_renamed("PlanRow.trace", "PlanRow.step")
        return self.step


def told_apart(rows: Iterable[PlanRow]) -> dict[int, PlanRow]:
    """The rows by their `id`, those of different settings with a name of their own each."""
    settings: dict[str, list[Setting]] = {}
    found = {}
    for row in rows:
        known = settings.setdefault(row.setting.name, [])
        if row.setting not in known:
            known.append(row.setting)
        number = known.index(row.setting) + 1
        found[id(row)] = row if number == 1 else replace(row, setting=replace(row.setting, number=number))
    return found
