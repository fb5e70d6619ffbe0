"""Methods of local learning. To add one: a file with a `LocalLoss`, and a line in `localprop.registry`."""

from typing import Any

from localprop.errors import ConfigError
from localprop.network.loss import LocalLoss, ModuleSpec, TaskLoss
from localprop.registry import METHODS
from localprop.settings.options import check_options

__all__ = ["METHODS", "build_loss", "check_method"]


def check_method(name: str, modules: int | None, options: dict[str, Any]) -> int:
    """Checks a method's name and options, and gives the number of modules (default 4).

    Raises:
        ConfigError: no such method or option, or a number of modules that the method does not allow.
    """
    check_options("method", name, METHODS.lookup(name), options)
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
