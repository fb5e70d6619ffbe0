"""Moved; this name stays for one version: `localprop.parallel.placement`."""

import warnings

from localprop.parallel.placement import IN_FLIGHT

warnings.warn(
    "localprop.layout has moved: import IN_FLIGHT from localprop.parallel.placement", DeprecationWarning, stacklevel=2
)

__all__ = ["IN_FLIGHT"]
