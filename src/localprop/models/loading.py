"""Loads weights into a model while timm builds it, through timm's own filters, and says what came of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.models import _builder
from torch import Tensor, nn

from localprop.errors import ConfigError, NonFiniteWeightError, counted, listing

_LOAD = "load_state_dict"
_COUNTER = "num_batches_tracked"  # of batch norm; weights of old versions of torch have none


@dataclass
class Loading:
    """Weights on their way into a model.

    Attributes:
        place: where they are from, for messages.
        model: the name of the model.
        tensors: by name; None leaves timm its own.
        new: names of the model's tensors that are not among them: of its classifier, for other classes.
        total: number of the model's tensors; None until weights have been loaded.
    """

    place: str
    model: str
    tensors: dict[str, Tensor] | None = None
    new: list[str] = field(default_factory=list)
    total: int | None = None

    @property
    def note(self) -> str | None:
        """A line for the user; None where nothing is known of what was loaded."""
        if self.total is None:
            return None
        new = f"; new: {listing(self.new)}" if self.new else ""
        return f"{self.place}: loaded {self.total - len(self.new)} of {self.total} tensors{new}"

    @contextmanager
    def in_timm(self) -> Iterator[None]:
        """Inside, `timm.create_model(..., pretrained=True)` loads these weights.

        timm's factory takes no tensors, and does not say what it has loaded. So the function that it loads with is
        wrapped, and all that timm does with weights stays timm's: the filter that renames tensors and resizes position
        embeddings, and the first convolution for other channels.
        """
        original = _builder.load_pretrained

        def load(model: nn.Module, pretrained_cfg: dict[str, Any], num_classes: int = 1000, **options: Any) -> None:
            settings = dict(pretrained_cfg)
            if self.tensors is not None:
                # `fill` looks at the classes that the tensors have, whatever timm knows of its own weights.
                settings |= {
                    "state_dict": dict(self.tensors),
                    "source": None,
                    "num_classes": num_classes,
                    "label_offset": 0,
                }
            setattr(model, _LOAD, lambda tensors, strict=True, **_: self.fill(model, tensors, strict))
            try:
                original(model, pretrained_cfg=settings, num_classes=num_classes, **options)
            finally:
                delattr(model, _LOAD)

        setattr(_builder, original.__name__, load)
        try:
            yield
        finally:
            setattr(_builder, original.__name__, original)

    def fill(self, model: nn.Module, tensors: dict[str, Tensor], strict: bool = True) -> Any:
        """Loads tensors into a model; a classifier for other classes is new, and zero.

        With it the first loss is that of guessing, and its gradient does not disturb the other weights at once.

        Returns:
            What `load_state_dict` returns.

        Raises:
            ConfigError: they are of another model; the line says what differs.
            NonFiniteWeightError: one is NaN or infinite.
        """
        own = model.state_dict()
        head = {name for name in own if name.rpartition(".")[0] in classifiers(model)}
        if any(name not in tensors or tensors[name].shape != own[name].shape for name in head):
            tensors = {name: value for name, value in tensors.items() if name not in head}
        if self.tensors is not None:
            self._require_same_model(own, tensors, head)
            strict = False
        result = type(model).load_state_dict(model, tensors, strict=strict)
        self.new = [name for name in result.missing_keys if not name.endswith(_COUNTER)]
        self.total = len(own)
        with torch.no_grad():
            for name in head & set(self.new):
                own[name].zero_()  # `state_dict` shares its memory
        return result

    def _require_same_model(self, own: dict[str, Tensor], tensors: dict[str, Tensor], head: set[str]) -> None:
        lacking = [name for name in own if name not in tensors and name not in head and not name.endswith(_COUNTER)]
        more = [name for name in tensors if name not in own]
        shapes = [
            f"{name} is {tuple(tensors[name].shape)} and not {tuple(value.shape)}"
            for name, value in own.items()
            if name in tensors and tensors[name].shape != value.shape
        ]
        parts = [
            f"{start} {counted(len(found), 'tensor')} {end} ({listing(found, 3)})"
            for start, found, end in (("it lacks", lacking, f"of {len(own)}"), ("has", more, "more"))
            if found
        ]
        parts += [f"{counted(len(shapes), 'tensor')} of another shape ({listing(shapes, 2)})"] if shapes else []
        if parts:
            raise ConfigError(
                f"{self.place} is not of {self.model}: {'; '.join(parts)}; name its model with --model, and arguments "
                "with --model-kwargs"
            )
        for name, value in tensors.items():
            if value.is_floating_point() and not torch.isfinite(value).all() and torch.isfinite(own[name]).all():
                raise NonFiniteWeightError(f"{self.place}: {name} is not finite; start from other weights")


def classifiers(model: nn.Module) -> set[str]:
    """Names of the layers that give the logits: timm knows those of its models; of others it is the last linear one."""
    known = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    if known:
        return {known} if isinstance(known, str) else set(known)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return set(linear[-1:])
