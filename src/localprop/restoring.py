"""Checks of what a checkpoint gives back to a module, before it is taken over."""

from typing import Any

import torch
from torch import Tensor

from localprop.reading import MAPPING, NUMBER, Kind, Malformed, check


def _named_tensors(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, Tensor) and isinstance(k, str) for k, v in value.items())


_TENSORS = Kind("tensors by their names", _named_tensors)
_PART = {
    "backbone": _TENSORS,
    "auxiliary": MAPPING,
    "optimizer": {"state": MAPPING, "param_groups": [MAPPING]},
    "ema?": _TENSORS,
    "scaler?": MAPPING,
}
# Of these, each element belongs to one of the parameter's.
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


def check_part(part: Any) -> None:
    """Checks the form of a module's part of a checkpoint.

    Raises:
        Malformed: it has another one.
    """
    check(part, _PART)


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Gives an optimizer the state that its `state_dict` gave, once it is checked as far as it can be before a step.

    Raises:
        Malformed: a setting is of another kind or missing, or what is kept of a parameter does not fit it.
        ValueError: it is of other groups of parameters.
    """
    before = optimizer.state_dict()
    _check_optimizer(optimizer, saved)
    optimizer.load_state_dict(saved)
    for own, group in zip(before["param_groups"], optimizer.param_groups, strict=True):
        if missing := own.keys() - group.keys():  # and no default that a later version of torch fills in
            optimizer.load_state_dict(before)
            raise Malformed(f"the optimizer's {min(missing)} is missing")


def _check_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    for group, other in zip(optimizer.param_groups, saved["param_groups"], strict=False):
        for name, value in group.items():
            if name == "params" or name not in other or (other[name] is None and name in ("foreach", "fused")):
                continue
            if not _alike(other[name], value):
                raise Malformed(f"the optimizer's {name} is {str(other[name])[:40]!r}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = set()
    for number, entries in saved["state"].items():
        if type(number) is not int or not 0 <= number < len(parameters) or not isinstance(entries, dict):
            raise Malformed(f"the optimizer keeps something of parameter {str(number)[:40]!r}, which it has not")
        kept.add(tuple(sorted((str(name), isinstance(value, Tensor)) for name, value in entries.items())))
        for name in _MOMENTS:
            value = entries.get(name)
            if isinstance(value, Tensor) and value.shape != parameters[number].shape:
                raise Malformed(f"the optimizer's {name} has another shape than its parameter")
    # Others, such as Adafactor, keep different things of vectors and of matrices.
    if len(kept) > 1 and type(optimizer).__module__.startswith("torch.optim"):
        raise Malformed("the optimizer does not keep the same of all parameters")


def _alike(value: Any, own: Any) -> bool:
    """Whether a setting of an optimizer may take the place of its own one."""
    if own is None:
        return value is None or isinstance(value, bool)
    if isinstance(own, bool):
        return isinstance(value, bool)
    if isinstance(own, (int, float)):
        return NUMBER.holds(value)
    if isinstance(own, (list, tuple)):
        return type(value) is type(own) and len(value) == len(own) and all(map(_alike, value, own))
    return isinstance(value, type(own))
