"""The bounds of numbers in settings: one table for flags, files of settings and code; and equal parts of a batch."""

import dataclasses
import math
import sys
from typing import Any, NamedTuple

from localprop.errors import ConfigError, shown

MOST = 10**9
"""The largest whole number of a setting that has no bound of its own: larger ones are slips of the hand."""


def is_finite(value: float) -> bool:
    """Whether a number is finite as a float: whole numbers may be too large to be one."""
    return abs(value) <= sys.float_info.max


class Bounds(NamedTuple):
    """From `least` to `most`, both included unless they are open."""

    least: float
    most: float = math.inf
    above: bool = False
    """Whether `least` itself is excluded."""
    below: bool = False
    """Whether `most` itself is excluded."""

    def hold(self, value: float) -> bool:
        """Whether a number is within the bounds; NaN and infinity never are."""
        low = value > self.least if self.above else value >= self.least
        high = value < self.most if self.below else value <= self.most
        return is_finite(value) and low and high

    def text(self, value: float) -> str:
        """What a number outside of the bounds must be."""
        low = f"{'above' if self.above else 'at least'} {self.least}"
        if self.below:
            return f"{low} and below {self.most}"
        if self.most == math.inf:
            return low if is_finite(value) else f"finite and {low}"
        if self.most == MOST:
            return low if value < self.least else f"at most {self.most}"
        return f"between {self.least} and {self.most}"


_COUNT, _FROM_0, _PART = Bounds(1, MOST), Bounds(0), Bounds(0, 1, below=True)
BOUNDS = {
    **dict.fromkeys(("epochs", "batch_size", "micro_batches", "modules", "img_size", "num_classes", "lora"), _COUNT),
    **dict.fromkeys(("nproc", "jobs", "steps", "val_interval", "checkpoint_steps", "checkpoint_hist"), _COUNT),
    **dict.fromkeys(("min_depth", "reach", "freeze_modules", "workers", "bad_images", "crop_pad"), Bounds(0, MOST)),
    **dict.fromkeys(
        ("lr", "finish_lr", "min_lr", "weight_decay", "warmup_epochs", "mixup", "cutmix", "kinetic"), _FROM_0
    ),
    **dict.fromkeys(("finish", "drop_path", "val_split", "smoothing", "model_ema_decay"), _PART),
    **dict.fromkeys(("backbone_lr_scale", "layer_decay"), Bounds(0, 1, above=True)),
    "hflip": Bounds(0, 1),
    **dict.fromkeys(("clip_grad", "lora_alpha"), Bounds(0, above=True)),
    "seed": Bounds(-(2**63), 2**64 - 1),  # what torch.manual_seed accepts
}
"""By the name of a setting."""


def require_within_bounds(settings: Any) -> None:
    """Raises a ConfigError where a number in a dataclass of settings, or in its pairs, is not within its bounds.

    A number whose setting has no bounds has to be finite.
    """
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        flag = f"--{f.name.replace('_', '-')}"
        if isinstance(value, dict):
            for key, item in value.items():
                if not _finite(item):
                    raise ConfigError(f"{flag} has {key}={item}; its numbers must be finite")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            bounds = BOUNDS.get(f.name, Bounds(-MOST, MOST) if isinstance(value, int) else None)
            if bounds and not bounds.hold(value):
                raise ConfigError(f"{flag} is {shown(value)}; it must be {bounds.text(value)}")
            if not is_finite(value):
                raise ConfigError(f"{flag} is {value}; it must be finite")


def require_equal_parts(batch_size: int, micro_batches: int, replicas: int = 1) -> None:
    """Raises a ConfigError where a batch does not divide into so many micro-batches for each of so many replicas."""
    parts = replicas * micro_batches
    if batch_size % parts:
        counts = {"replicas": replicas, "micro-batches": micro_batches}
        words = [f"{count} {noun}" for noun, count in counts.items() if count > 1]
        raise ConfigError(
            f"--batch-size {batch_size} does not divide equally into {' of '.join(words)}; take --batch-size "
            f"{-(-batch_size // parts) * parts}"
        )


def _finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
