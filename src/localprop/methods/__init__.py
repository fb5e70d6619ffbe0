"""Methods of local learning. To add one: a file with a `LocalLoss`, and a line in `localprop.registry`."""

from typing import Any

from localprop.errors import ConfigError
from localprop.network.loss import LocalLoss, ModuleSpec, TaskLoss
from localprop.registry import METHODS
from localprop.settings.options import check_options

__all__ = ["METHODS", "build_loss", "check_method"]


def check_method(name: str, modules: int | None, options: dict[str, Any]) -> int:
    """Checks a method's name and options, and gives the number of modules (default 4, or what the method says).

    Raises:
        ConfigError: no such method or option, or an impossible number of modules.
    """
    method = METHODS.lookup(name)
    check_options("method", name, method, options)
    if modules is not None and modules < 1:
        raise ConfigError(f"modules is {modules}; it must be at least 1")
    usual: int = getattr(method, "usual_modules", 4)
    return modules or usual


def varying(options: dict[str, Any]) -> bool:
    """Whether options of a method may give modules between the first and the last different losses: weights by depth,
    and what is for the first modules only.
    """
    by_depth = any(isinstance(value, (tuple, list)) and value[0] != value[-1] for value in options.values() if value)
    return by_depth or bool(options.get("contrast")) or bool(options.get("published"))


def build_loss(name: str, spec: ModuleSpec, options: dict[str, Any]) -> LocalLoss:
    """The local loss of one module; the last has the backbone's own prediction, whatever the method."""
    return TaskLoss(spec) if spec.last else METHODS[name](spec, **options)
