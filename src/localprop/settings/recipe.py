"""What a local network is made of: one list of settings for flags, the library, plans and records."""

import dataclasses
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import Annotated, Any, Literal

import tyro

from localprop.errors import ConfigError, suggestion
from localprop.registry import DECODERS, HEADS, METHODS
from localprop.settings.bounds import require_within_bounds
from localprop.settings.values import AutoBool, OptionalFloat, OptionalInt, OptionalNames, OptionalStr, Pairs

Recomputation = str
"""What a unit computes again in backward instead of keeping it: nothing ("none"); activation functions and layer norms
("cheap", see `localprop.memory.recompute`); all of it, from its input alone ("whole"); or all of it, in slices of the
batch, one after another ("whole/4", see `localprop.memory.slices`)."""
_RECOMPUTATION = re.compile(r"none|cheap|whole(/([2-9]|[1-9][0-9]{1,5}))?")
Frozen = Literal["", "half", "first"]
"""What is frozen where that is the planner's choice: nothing, the first half, or the first module."""
ALL = "all"
"""What `Recipe.freeze` calls everything before the classifier."""
END_TO_END = "end-to-end"
"""The method whose gradients are exact."""
# Of what needs more than a line: tyro keeps a line break of a field's docstring.
_PARTITION_HELP = (
    "Where to cut: balanced (the largest peak memory of a module is as small as possible), compute (the slowest module "
    "is as fast as possible) or stage (where the resolution changes)."
)
_HEAD_HELP = f"What predicts the target in a module: {', '.join(HEADS)} (default: mlp, or what the method says)."
_REACH_HELP = (
    "Blocks of the next module through which a module's head reads its output (default: 0, or what the method "
    "says): closer to end-to-end training, with more memory and time."
)
_FREEZE_HELP = (
    "Names of units or blocks of units, or patterns such as blocks.[0-5], that are not trained; all is everything "
    "before the classifier: a linear probe."
)
_KINETIC_HELP = (
    "Weight of each block's mean squared change of its input, halved in the second half of the modules (default: 0, or "
    "what the method says)."
)


@dataclass(frozen=True)
class Recipe:
    """What a local network is made of. What is None depends on the rest: see `resolved`."""

    method: Annotated[str, tyro.conf.arg(help=f"How modules learn: {', '.join(METHODS)}.")] = "feature-reconstruction"
    modules: OptionalInt = None
    """Number of modules (default: 4; of end-to-end 1, and more take less memory for the same gradients)."""
    decoder: Annotated[str, tyro.conf.arg(help=f"What rebuilds the target: {', '.join(DECODERS)}.")] = "pixel-shuffle"
    head: Annotated[OptionalStr, tyro.conf.arg(metavar="STR", help_behavior_hint="", help=_HEAD_HELP)] = None
    head_kwargs: Pairs = None
    """For the head, such as depth=2."""
    kinetic: Annotated[OptionalFloat, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="", help=_KINETIC_HELP)] = None
    partition: Annotated[Literal["balanced", "compute", "stage"], tyro.conf.arg(help=_PARTITION_HELP)] = "balanced"
    cuts: OptionalNames = None
    """Names of units or blocks of units to cut after, instead of --modules and --partition."""
    reach: Annotated[OptionalInt, tyro.conf.arg(metavar="INT", help_behavior_hint="", help=_REACH_HELP)] = None
    freeze_modules: int = 0
    """Number of first modules that are not trained: no gradient, no auxiliary net, batch norm as in evaluation."""
    freeze: Annotated[OptionalNames, tyro.conf.arg(metavar="NAME ...", help_behavior_hint="", help=_FREEZE_HELP)] = None
    min_depth: int = 1
    """Least number of blocks, or of parts of split ones, in a module; very shallow modules learn worse."""
    split_blocks: bool = False
    """Allow cuts inside blocks, between a transformer block's attention and its MLP."""
    recompute: AutoBool = None
    """Recompute activation functions and layer norms in backward. auto: local modules; on CUDA if --budget needs it."""
    grad_checkpointing: bool = False
    """Keep only the input of each unit, and run it again in backward: less memory, slower, the same numbers."""
    recompute_units: Pairs = None
    """Recomputation of units or blocks of units: none, cheap, whole, or in slices (layers.0=whole/4 layers.1=none)."""
    method_kwargs: Pairs = None
    """For the method, such as weight=0.5."""

    def __post_init__(self) -> None:
        for name in ("modules", "reach", "freeze_modules", "min_depth"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
                raise ConfigError(f"--{name.replace('_', '-')} is {value!r}; it must be a whole number")
        if self.kinetic is not None and (isinstance(self.kinetic, bool) or not isinstance(self.kinetic, Real)):
            raise ConfigError(f"--kinetic is {self.kinetic!r}; it must be a number")
        require_within_bounds(self)
        for unit, value in (self.recompute_units or {}).items():
            if not (isinstance(value, str) and _RECOMPUTATION.fullmatch(value)):
                raise ConfigError(
                    f"--recompute-units has {unit}={value}; it must be none, cheap, whole, or whole/2, whole/3, ... "
                    "to run again in so many slices of the batch"
                )

    @classmethod
    def of(cls, **settings: Any) -> "Recipe":
        """A recipe of some settings, with one line for a name that there is not.

        Raises:
            ConfigError: no such setting, or an impossible value.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for name in settings:
            if name not in known:
                raise ConfigError(f"a local network has no setting {name!r}; {suggestion(name, known)}")
        try:
            return cls(**settings)
        except ConfigError as error:  # its line names a flag, and here there are none
            raise ConfigError(re.sub(r"^--([\w-]+)", lambda flag: flag[1].replace("-", "_"), str(error))) from None

    @property
    def count(self) -> int | None:
        """The number of local modules that is asked for, K; None where it is left open.

        Raises:
            ConfigError: modules and cuts say different things.
        """
        if self.cuts is None:
            return self.modules
        if self.modules not in (None, len(self.cuts) + 1):
            raise ConfigError(
                f"{len(self.cuts)} cuts make {len(self.cuts) + 1} modules, not {self.modules}; leave out one of the two"
            )
        return len(self.cuts) + 1

    @property
    def end_to_end(self) -> bool:
        """Whether gradients are those of end-to-end training, whatever the number of modules."""
        return self.method == END_TO_END

    @property
    def asks_local(self) -> bool:
        """Whether it says that modules learn locally, by anything but the usual method."""
        local = bool(self.modules and self.modules > 1) or self.cuts is not None or bool(self.reach)
        return not self.end_to_end and (local or self.method != Recipe.method)

    @property
    def options(self) -> dict[str, Any]:
        """The method's options that are given."""
        return dict(self.method_kwargs or {})

    def record(self) -> dict[str, Any]:
        """The settings as JSON has them; options of the method that it does not have are left out."""
        options = {name: value for name, value in self.options.items() if _is_plain(value)}
        return dataclasses.asdict(dataclasses.replace(self, method_kwargs=options))

    def recomputation(self, unit: str, last: bool, shared: bool = False) -> Recomputation:
        """What a unit computes again in backward, where all that is open is resolved.

        Args:
            unit: its name. The longest name in `recompute_units` that is its own, or that of a block with it, decides.
            last: whether it is the last unit of its module. What that keeps is needed at once, so nothing is gained by
                computing it twice, unless it is computed in slices.
            shared: whether a head reads it ahead: with two backward passes it would be computed three times.
        """
        own = self.recompute_units or {}
        names = [name for name in own if unit == name or unit.startswith(f"{name}.")]
        default = "whole" if self.grad_checkpointing else self.cheap
        value: Recomputation = own[max(names, key=len)] if names else default
        return self.cheap if (value == "whole" and last) or (runs_again(value) and shared) else value

    def freezes(self, unit: str, last: bool) -> bool:
        """Whether `freeze` says that a unit is not trained.

        Args:
            unit: its name.
            last: whether it is the last one of all, the classifier, which "all" leaves out.
        """
        parts = unit.split(".")
        names = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        return any(
            (pattern == ALL and not last) or any(fnmatchcase(name, pattern) for name in names)
            for pattern in self.freeze or ()
        )

    @property
    def cheap(self) -> Recomputation:
        """What a local loss computes again, and a unit that does not run again as a whole: "cheap" or "none"."""
        return "cheap" if self.recompute else "none"


def runs_again(recomputation: Recomputation) -> int:
    """In how many slices of the batch a unit runs again in backward: 1 if it does so at once, 0 if it does not."""
    kind, _, count = recomputation.partition("/")
    return int(count or 1) if kind == "whole" else 0


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
