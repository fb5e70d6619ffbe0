"""Moved; this name stays for one version: `localprop.planning.schedules`."""

import warnings

from localprop.planning import schedules as _moved
from localprop.planning.schedules import *  # noqa: F403

warnings.warn(
    "localprop.schedules has moved: import from localprop.planning.schedules", DeprecationWarning, stacklevel=2
)

__all__ = _moved.__all__
