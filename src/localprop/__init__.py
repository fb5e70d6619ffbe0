"""Train transformers, and any other timm or torch model, without end-to-end backpropagation."""

# ruff: noqa: E402
from localprop.system.launched import watch_launcher as _watch_launcher
from localprop.system.startup import catch_interrupts as _catch_interrupts

# Before torch is imported, which takes seconds.
_catch_interrupts()
_watch_launcher()

from localprop.data.sources import ImageDataset
from localprop.division.divide import localize
from localprop.errors import LocalpropError
from localprop.network.network import LocalLoss, LocalModule, LocalNetwork, LocalOutput, ModuleSpec
from localprop.planning.plans import Plan, PlanRow, plan
from localprop.registry import DATASETS, DECODERS, HEADS, METHODS, MODELS, TASKS
from localprop.system.provenance import provenance
from localprop.tracing.chains import chain
from localprop.tracing.units import Chain, Unit

__version__ = "0.2.0.dev0"
__all__ = [
    "DATASETS",
    "DECODERS",
    "HEADS",
    "METHODS",
    "MODELS",
    "TASKS",
    "Chain",
    "ImageDataset",
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
