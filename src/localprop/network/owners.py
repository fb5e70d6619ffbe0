"""Which tensors of a backbone belong to which local module, and giving up those of others."""

from collections.abc import Sequence

import torch
from torch import nn

from localprop.network.module import LocalModule


def shares_of(backbone: nn.Module, modules: Sequence[LocalModule]) -> list[list[str]]:
    """See `LocalNetwork.shares`."""
    tensors = backbone.state_dict(keep_vars=True)
    owners: dict[int, int] = {}
    for k, module in enumerate(modules):
        own = [*module.named_parameters(), *((name, tensors.get(name)) for name in module.buffers_used)]
        for _, tensor in own:
            owners.setdefault(id(tensor), k)
    shares: list[list[str]] = [[] for _ in modules]
    for name, tensor in tensors.items():
        shares[owners.get(id(tensor), 0)].append(name)
    return shares


def give_up(model: nn.Module, names: list[str]) -> None:
    """Makes these parameters of a model meta tensors."""
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for name in names:
        place, _, leaf = name.rpartition(".")
        owner = model.get_submodule(place)
        parameter = getattr(owner, leaf)
        if isinstance(parameter, nn.Parameter):
            empty = torch.empty_like(parameter, device="meta")
            # Tied weights stay tied.
            setattr(owner, leaf, replaced.setdefault(parameter, nn.Parameter(empty, parameter.requires_grad)))
