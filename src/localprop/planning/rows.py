"""The rows of a plan: one way to train a model, and what that needs."""

from dataclasses import dataclass, field
from typing import Any

from localprop.errors import warn_renamed
from localprop.planning.processes import Processes
from localprop.planning.steps import PredictedStep
from localprop.settings.recipe import Recipe


@dataclass(frozen=True)
class Setting:
    """One way to train a model.

    Attributes:
        recipe: what the network is made of, with a number of modules.
        largest: whether there cannot be more modules.
        recomputes: whether cheap results are computed again because a budget needs it.
    """

    recipe: Recipe
    largest: bool = False
    recomputes: bool = False

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
        more = (" + recompute" if self.recomputes else "") + (" + ckpt" if self.grad_checkpointing else "")
        return ", ".join(words) + more

    def described(self) -> dict[str, Any]:
        """Name and settings, for a JSON file. A setting that is not there is off."""
        keys = ("modules", "method", "split_blocks", "grad_checkpointing", "largest")
        again = {"recompute": True} if self.recomputes else {}
        return {"setting": self.name, **{key: getattr(self, key) for key in keys}, **again}


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
        warn_renamed("PlanRow.trace", "PlanRow.step")
        return self.step
