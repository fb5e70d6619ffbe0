"""Methods of local learning. To add one: a file with a `LocalLoss`, and a line in `localprop.registry`."""

import inspect
from numbers import Real
from typing import Any

from localprop.errors import ConfigError, suggestion
from localprop.network.loss import LocalLoss, ModuleSpec, TaskLoss
from localprop.registry import METHODS

__all__ = ["METHODS", "build_loss", "check_method"]


def check_method(name: str, modules: int | None, options: dict[str, Any]) -> int:
    """Checks a method's name and options, and gives the number of modules (default 4).

    Raises:
        ConfigError: no such method or option, or a number of modules that the method does not allow.
    """
    method = METHODS.lookup(name)
    known = dict(list(inspect.signature(method).parameters.items())[1:])
    for option, value in options.items():
        if option not in known:
            hint = suggestion(option, known) if known else "it has none"
            raise ConfigError(f"method {name} has no option {option!r}; {hint}")
        kind = type(known[option].default)
        if kind in (bool, float) and not isinstance(value, bool if kind is bool else Real):
            raise ConfigError(
                f"method {name}: {option} is {value!r}; it is {'True or False' if kind is bool else 'a number'}"
            )
    if modules is not None and modules < 1:
        raise ConfigError(f"modules is {modules}; it must be at least 1")
    only = only_modules(name)
    if only and modules not in (None, only):
        raise ConfigError(f"method {name} has {only} module, not {modules}; leave out modules, or choose a method")
    return modules or only or 4


def only_modules(name: str) -> int | None:
    """The only number of modules that a method allows; None where it allows any, or is unknown."""
    return getattr(METHODS.get(name), "only_modules", None)


def build_loss(name: str, spec: ModuleSpec, options: dict[str, Any]) -> LocalLoss:
    """The local loss of one module; the last has the backbone's own prediction, whatever the method."""
    return TaskLoss(spec) if spec.last else METHODS[name](spec, **options)
