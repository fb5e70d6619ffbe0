"""A module's local loss, and what it may know of the module that it is built for."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from localprop.decoders import build_decoder
from localprop.decoders.common import Decoder
from localprop.errors import warn_renamed
from localprop.features import Layout
from localprop.heads import HEADS, build_head
from localprop.heads.common import Place
from localprop.tasks.base import Task
from localprop.tracing.units import Unit


@dataclass(frozen=True)
class ModuleSpec:
    """What a local loss may know of the module it is built for.

    Attributes:
        index: which module, from 0.
        count: number of modules, K.
        input: layout of the module's input, that of the network's input for the first.
        output: layout of the module's output.
        source: layout of the network's input.
        task: what the network is trained for.
        prediction: shape of the network's output, batch axis left out.
        head: name of the auxiliary head.
        decoder: name of the decoder.
        mean, std: per channel, with which images are normalised.
        following: the units after the module, in order, each with the layout of its output; none after the last module.
        place: where the head stands, for heads that resemble what follows.
        head_options: the head's options.
        ahead: layout of what the head reads, where that is not the module's output; see `Recipe.reach`.
        span: number of the module's first unit, and of the unit after its last, in `place.units`.
    """

    index: int
    count: int
    input: Layout
    output: Layout
    source: Layout
    task: Task
    prediction: tuple[int, ...]
    head: str
    decoder: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    following: tuple[tuple[Unit, Layout], ...] = ()
    place: Place | None = None
    head_options: dict[str, Any] = field(default_factory=dict, hash=False)
    ahead: Layout | None = None
    span: tuple[int, int] = (0, 0)

    @property
    def last(self) -> bool:
        """Whether this is the module with the backbone's own prediction."""
        return self.index == self.count - 1

    @property
    def seen(self) -> Layout:
        """Layout of what the head reads: the module's output, or what the next module's first blocks make of it."""
        return self.ahead or self.output

    def build_head(self, outputs: int | None = None) -> nn.Module:
        """A head that reads features of the layout `seen`.

        Args:
            outputs: how many numbers it gives for each example; default: a prediction like the network's.
        """
        kind = HEADS.lookup(self.head)
        if getattr(kind, "needs_place", False):
            return kind(self.seen, outputs, self.place, **self.head_options)
        if outputs is not None:
            return build_head(self.head, self.seen, outputs)
        return self.task.head(self.head, self.seen, self.prediction)

    def build_decoder(self, target: Layout) -> Decoder:
        """A decoder from the module's output to a grid: (B, target.channels, target.height, target.width)."""
        return build_decoder(self.decoder, self.output, target)

    @property
    def image(self) -> Layout:
        """Name of `source` in version 0.1."""
        warn_renamed("ModuleSpec.image", "ModuleSpec.source")
        return self.source

    @property
    def criterion(self) -> Any:
        """Name of `task.loss` in version 0.1."""
        warn_renamed("ModuleSpec.criterion", "ModuleSpec.task.loss")
        return self.task.loss

    @property
    def num_classes(self) -> int:
        """Name of `prediction[-1]` in version 0.1."""
        warn_renamed("ModuleSpec.num_classes", "ModuleSpec.prediction[-1]")
        return self.prediction[-1]


class LocalLoss(nn.Module, ABC):
    """A module's local loss, with the auxiliary nets that it needs and inference does not.

    Attributes:
        uses_inputs: whether the loss looks at the network's inputs (other than as the input of the first module). Where
            no later module's does, they are freed.
        rate: times which the learning rate of the module's share of the backbone is.
        needs_units: whether it is made of the module's own units (`ModuleSpec.span`), on which its cost then depends.
        defaults: settings of a `localprop.Recipe`, head, kinetic or reach, that the method has where the user says
            nothing.
    """

    uses_inputs: bool = True
    rate: float = 1.0
    needs_units: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Names of version 0.1, in which a plugin's class may be written.
        for old, new in (("classify", "predict"), ("uses_images", "uses_inputs")):
            if old in vars(cls):
                warn_renamed(f"{cls.__name__}.{old}", f"{cls.__name__}.{new}", stacklevel=3)
                if new not in vars(cls):
                    setattr(cls, new, vars(cls)[old])
                delattr(cls, old)

    @abstractmethod
    def forward(
        self, output: Tensor, features: Tensor, inputs: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Computes the local loss. All arguments are given by position.

        Args:
            output: the module's output; gradients flow back through it.
            features: the module's input, detached.
            inputs: the network's inputs; None where `uses_inputs` is False.
            targets: as the task has them; of classification (B,) integers, or (B, C) probabilities.

        Returns:
            The loss (a scalar), and the head's prediction if there is one, else None.
        """

    @abstractmethod
    def predict(self, output: Tensor) -> Tensor | None:
        """The head's prediction for a module's output; None without a head that predicts targets."""

    def classify(self, output: Tensor) -> Tensor | None:
        """Name of `predict` in version 0.1."""
        warn_renamed(f"{type(self).__name__}.classify", f"{type(self).__name__}.predict")
        return self.predict(output)

    @property
    def uses_images(self) -> bool:
        """Name of `uses_inputs` in version 0.1."""
        warn_renamed(f"{type(self).__name__}.uses_images", f"{type(self).__name__}.uses_inputs")
        return self.uses_inputs

    @uses_images.setter
    def uses_images(self, value: bool) -> None:
        self.uses_inputs = value


class HeadLoss(LocalLoss):
    """A local loss of two parts: the head's term, and all else. So its head may read ahead; see `Recipe.reach`.

    Attributes:
        task: what the network is trained for.
        head: predicts the targets, or is None where the loss has no such term.
    """

    head: nn.Module | None

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__()
        self.task = spec.task

    def __getstate__(self) -> dict[str, Any]:
        # A copy is not compiled, as of any module: compiled parts in it would be those of the original.
        state: dict[str, Any] = super().__getstate__()
        return {name: value for name, value in state.items() if name not in ("judge", "rest")}

    def judge(self, seen: Tensor, targets: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The head's term. All that it trains is the head.

        Args:
            seen: what the head reads: the module's output, or what the next module's first blocks make of it.
            targets: as the task has them.

        Returns:
            The term (a scalar) and the head's prediction; each None where there is none.
        """
        prediction = self.predict(seen)
        return None if prediction is None else self.task.loss(prediction, targets), prediction

    def rest(self, output: Tensor, features: Tensor, inputs: Tensor | None, targets: Tensor) -> Tensor | None:
        """All other terms (a scalar), None where there are none; arguments are those of `forward`."""
        return None

    def forward(
        self, output: Tensor, features: Tensor, inputs: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """See `LocalLoss.forward`: the sum of both parts, where the head reads the output."""
        judged, prediction = self.judge(output, targets)
        rest = self.rest(output, features, inputs, targets)
        terms = [term for term in (judged, rest) if term is not None]
        return sum(terms[1:], terms[0]), prediction

    def predict(self, output: Tensor) -> Tensor | None:
        """The head's prediction for what it reads; None where it predicts no targets."""
        return None if self.head is None else self.head(output)

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """What the head's term trains."""
        return iter(()) if self.head is None else self.head.parameters()


class _Zero(LocalLoss):
    """A loss of 0, which depends on nothing.

    Args:
        spec: the module it is built for, which does not matter.
    """

    uses_inputs = False

    def __init__(self, spec: ModuleSpec | None) -> None:
        super().__init__()

    def forward(self, output: Tensor, features: Tensor, inputs: Tensor | None, targets: Tensor) -> tuple[Tensor, None]:
        """See `LocalLoss.forward`."""
        return output.new_zeros(()), None

    def predict(self, output: Tensor) -> None:
        """Nothing."""


class NoLoss(_Zero):
    """Of a module before the last in exact training: its gradient comes from the module behind it."""


class Frozen(_Zero):
    """Of a local module that only runs, because nothing in it is trained: it has no auxiliary net."""


class TaskLoss(LocalLoss):
    """The last module's loss under every method: the task's loss of the backbone's own prediction."""

    uses_inputs = False

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__()
        self.task = spec.task

    def forward(
        self, output: Tensor, features: Tensor, inputs: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `LocalLoss.forward`; the output is the prediction."""
        return self.task.loss(output, targets), output

    def predict(self, output: Tensor) -> Tensor:
        """The output itself."""
        return output
