"""Train transformers, and any other timm or torch model, without end-to-end backpropagation.

A name is imported when it is asked for: `import localprop` alone does not import torch.
"""

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from localprop.system.launched import watch_launcher as _watch_launcher
from localprop.system.startup import catch_interrupts as _catch_interrupts

# Before torch is imported, which takes seconds.
_catch_interrupts()
_watch_launcher()

if TYPE_CHECKING:
    from localprop.data.sources import ImageDataset
    from localprop.division.divide import localize
    from localprop.errors import LocalpropError
    from localprop.features import Example, Layout
    from localprop.models.lora import add_lora, merge_lora
    from localprop.network.loss import HeadLoss, LocalLoss, ModuleSpec
    from localprop.network.module import LocalModule
    from localprop.network.network import LocalNetwork
    from localprop.network.output import LocalOutput
    from localprop.planning.plans import Plan, plan
    from localprop.planning.rows import PlanRow
    from localprop.registry import DATASETS, DECODERS, HEADS, METHODS, MODELS, TASKS
    from localprop.report.measures import Measure
    from localprop.settings.recipe import Recipe
    from localprop.system.provenance import provenance
    from localprop.tasks.base import Task
    from localprop.tasks.classification import Classification
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
    "Classification",
    "Example",
    "HeadLoss",
    "ImageDataset",
    "Layout",
    "LocalLoss",
    "LocalModule",
    "LocalNetwork",
    "LocalOutput",
    "LocalpropError",
    "Measure",
    "ModuleSpec",
    "Plan",
    "PlanRow",
    "Recipe",
    "Task",
    "Unit",
    "add_lora",
    "chain",
    "localize",
    "merge_lora",
    "plan",
    "provenance",
]
_PLACES = {
    "localprop.data.sources": ("ImageDataset",),
    "localprop.division.divide": ("localize",),
    "localprop.errors": ("LocalpropError",),
    "localprop.features": ("Example", "Layout"),
    "localprop.models.lora": ("add_lora", "merge_lora"),
    "localprop.network.loss": ("HeadLoss", "LocalLoss", "ModuleSpec"),
    "localprop.network.module": ("LocalModule",),
    "localprop.network.network": ("LocalNetwork",),
    "localprop.network.output": ("LocalOutput",),
    "localprop.report.measures": ("Measure",),
    "localprop.settings.recipe": ("Recipe",),
    "localprop.tasks.base": ("Task",),
    "localprop.tasks.classification": ("Classification",),
    "localprop.planning.plans": ("Plan", "plan"),
    "localprop.planning.rows": ("PlanRow",),
    "localprop.registry": ("DATASETS", "DECODERS", "HEADS", "METHODS", "MODELS", "TASKS"),
    "localprop.system.provenance": ("provenance",),
    "localprop.tracing.chains": ("chain",),
    "localprop.tracing.units": ("Chain", "Unit"),
}
_MODULES = {name: module for module, names in _PLACES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    if not name.startswith("_") and find_spec(f"localprop.{name}"):
        return importlib.import_module(f"localprop.{name}")
    raise AttributeError(f"module 'localprop' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
