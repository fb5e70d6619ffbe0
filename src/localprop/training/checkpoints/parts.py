"""The parts of a checkpoint, one for each module: what is in them, and how it comes back."""

from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from localprop.errors import CheckpointError, first_line
from localprop.network.network import LocalNetwork
from localprop.training.checkpoints.restoring import load_optimizer


def part_name(k: int) -> str:
    """What the part of a checkpoint is called that holds module k."""
    return f"module-{k}"


def whole_weights(parts: dict[str, Any]) -> dict[str, Tensor]:
    """The backbone's state dict from the parts of all modules: the moving average where there is one."""
    return {name: tensor for part in parts.values() for name, tensor in part.get("ema", part["backbone"]).items()}


def part_of(
    net: LocalNetwork,
    k: int,
    names: list[str],
    optimizer: dict[str, Any],
    scaler: torch.amp.GradScaler | None,
    ema: ModelEmaV3 | None,
) -> dict[str, Any]:
    """Everything that has to be saved of a module.

    Args:
        net: the network.
        k: the module.
        names: its share of the backbone's state dict.
        optimizer: the state dict of its optimizer.
        scaler: its loss scale.
        ema: the moving average of the backbone.
    """
    weights = net.backbone.state_dict()
    part: dict[str, Any] = {
        "backbone": {name: weights[name] for name in names},
        "auxiliary": net.local_modules[k].auxiliary_state(),
        "optimizer": optimizer,
    }
    if ema:
        averages = ema.module.state_dict()
        part["ema"] = {name: averages[name] for name in names}
    if scaler:
        part["scaler"] = scaler.state_dict()
    return part


def load_part(
    net: LocalNetwork,
    k: int,
    names: list[str],
    parts: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    ema: ModelEmaV3 | None,
) -> None:
    """Gives a module what `part_of` gave, out of all `parts`; other arguments are those of `part_of`.

    Raises:
        CheckpointError: it is the part of another network.
    """
    try:
        part = parts[part_name(k)]
        _load_share(net.backbone, part["backbone"], names)
        net.local_modules[k].load_auxiliary_state(part["auxiliary"])
        load_optimizer(optimizer, part["optimizer"])
        if ema:
            _load_share(ema.module, part["ema"], names)
        if scaler:
            scaler.load_state_dict(part["scaler"])
    except (LookupError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the checkpoint does not fit the network ({first_line(error)}); resume with the versions of localprop "
            "and timm that the run was started with"
        ) from None


def _load_share(model: nn.Module, values: dict[str, Tensor], names: list[str]) -> None:
    """Loads a module's share of a backbone's state dict; raises ValueError if it is another one's."""
    if other := values.keys() ^ names:
        raise ValueError(f"its modules hold other weights, such as {min(other)}")
    model.load_state_dict(values, strict=False)
