"""Moved; this name stays for one version: `localprop.network.carry`."""

import warnings

from localprop.network.carry import Carry

warnings.warn("localprop.carry has moved: import Carry from localprop.network.carry", DeprecationWarning, stacklevel=2)

__all__ = ["Carry"]
