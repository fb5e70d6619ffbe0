"""Checks of what a checkpoint gives back to a module, before it is taken over."""

from typing import Any

import torch
from torch import Tensor

from localprop.system.reading import MAPPING, NUMBER, Kind, Malformed, check


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
_CHOSEN_BY_DEVICE = ("foreach", "fused", "capturable")
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
        Malformed: a setting is not the run's own or missing, or what is kept of a parameter does not fit it.
        ValueError: it is of other groups of parameters.
    """
    before = optimizer.state_dict()
    _check_groups(optimizer, saved["param_groups"])
    _check_state(optimizer, saved["state"])
    groups = saved["param_groups"]
    if _is_of_torch(optimizer):  # without what another version of torch keeps there, which is off
        groups = [
            {name: own[name] if name in _CHOSEN_BY_DEVICE else group[name] for name in own if name in group}
            for own, group in zip(before["param_groups"], groups, strict=False)
        ]
    optimizer.load_state_dict({**saved, "param_groups": groups})
    for own, group in zip(before["param_groups"], optimizer.param_groups, strict=True):
        if missing := own.keys() - group.keys():  # and no default that a later version of torch fills in
            optimizer.load_state_dict(before)
            raise Malformed(f"the optimizer's {min(missing)} is missing")


def _check_groups(optimizer: torch.optim.Optimizer, saved: list[dict[str, Any]]) -> None:
    """Checks an optimizer's settings: the learning rate follows a schedule, some optimizers adapt others too."""
    fixed = _is_of_torch(optimizer)
    for group, other in zip(optimizer.param_groups, saved, strict=False):
        for name, value in other.items():
            own = group.get(name)
            if name == "params" or name in _CHOSEN_BY_DEVICE:
                continue
            if name not in group:
                # Versions of torch differ in what they keep, where it is off; timm's schedules multiply by lr_scale.
                wrong = name == "lr_scale" or (fixed and value not in (None, False))
            elif name == "lr" or not fixed:
                wrong = not _alike(value, own)
            else:
                wrong = type(value) is not type(own) or value != own
            if wrong:
                raise Malformed(f"the optimizer's {str(name)[:40]} is {str(value)[:40]!r}")


def _check_state(optimizer: torch.optim.Optimizer, saved: dict[int, Any]) -> None:
    """Checks what an optimizer keeps of each parameter."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = set()
    for number, entries in saved.items():
        if type(number) is not int or not 0 <= number < len(parameters) or not isinstance(entries, dict):
            raise Malformed(f"the optimizer keeps something of parameter {str(number)[:40]!r}, which it has not")
        kept.add(tuple(sorted((str(name), isinstance(value, Tensor)) for name, value in entries.items())))
        for name, value in entries.items():
            if not _fits(name, value, parameters[number]):
                raise Malformed(f"the optimizer's {str(name)[:40]} does not fit its parameter")
        if isinstance(optimizer, torch.optim.Adam) and not {"step", *_MOMENTS[:2]} <= entries.keys():
            raise Malformed("the optimizer does not keep what Adam needs")
    # Others, such as Adafactor, keep different things of vectors and of matrices.
    if len(kept) > 1 and _is_of_torch(optimizer):
        raise Malformed("the optimizer does not keep the same of all parameters")


def _is_of_torch(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).__module__.startswith("torch.optim")


def _fits(name: Any, value: Any, parameter: Tensor) -> bool:
    """Whether something that an optimizer keeps of a parameter can be that."""
    if name in _MOMENTS:
        empty = name == "momentum_buffer" and value is None
        return empty or (isinstance(value, Tensor) and value.shape == parameter.shape and not _has_nan(value))
    if name == "step":
        return NUMBER.holds(value) or (isinstance(value, Tensor) and value.numel() == 1 and not _has_nan(value))
    return True


def _has_nan(tensor: Tensor) -> bool:
    # Infinity may be there: where a gradient's square overflows, Adam's step is zero.
    return type(tensor) is Tensor and tensor.is_floating_point() and bool(tensor.isnan().any())


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
