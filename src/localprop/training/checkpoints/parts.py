"""The parts of a checkpoint, one for each module, and the weights in them."""

from typing import Any

from torch import Tensor, nn


def part_name(k: int) -> str:
    """What the part of a checkpoint is called that holds module k."""
    return f"module-{k}"


def whole_weights(parts: dict[str, Any]) -> dict[str, Tensor]:
    """The backbone's state dict from the parts of all modules: the moving average where there is one."""
    return {name: tensor for part in parts.values() for name, tensor in part.get("ema", part["backbone"]).items()}


def load_share(model: nn.Module, values: dict[str, Tensor], names: list[str]) -> None:
    """Loads a module's share of a backbone's state dict; raises ValueError if it is another one's."""
    if other := values.keys() ^ names:
        raise ValueError(f"its modules hold other weights, such as {min(other)}")
    model.load_state_dict(values, strict=False)
