"""Train transformers, and any other timm or torch model, without end-to-end backpropagation."""

# ruff: noqa: E402
from localprop.launched import watch_launcher as _watch_launcher
from localprop.startup import catch_interrupts as _catch_interrupts

# Before torch is imported, which takes seconds.
_catch_interrupts()
_watch_launcher()

from localprop.chain import Chain, Unit, chain
from localprop.decoders import DECODERS
from localprop.errors import LocalpropError
from localprop.heads import HEADS
from localprop.localize import localize
from localprop.methods import METHODS
from localprop.network import LocalLoss, LocalModule, LocalNetwork, LocalOutput, ModuleSpec
from localprop.plan import Plan, PlanRow, plan
from localprop.provenance import provenance

__version__ = "0.1.0"
__all__ = [
    "DECODERS",
    "HEADS",
    "METHODS",
    "Chain",
    "LocalLoss",
    "LocalModule",
    "LocalNetwork",
    "LocalOutput",
    "LocalpropError",
    "ModuleSpec",
    "Plan",
    "PlanRow",
    "Unit",
    "chain",
    "localize",
    "plan",
    "provenance",
]
