"""Settings of `localprop plan`. Field docstrings are the help."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from localprop.errors import ConfigError
from localprop.settings.bounds import require_equal_parts, require_within_bounds
from localprop.settings.config import LocalConfig, ModelConfig
from localprop.settings.values import OptionalInt, OptionalPath, OptionalStr, parse_bytes


@dataclass(frozen=True)
class PlanConfig:
    """Predict memory, time and operations of a step, without GPU and data.

    Compares end-to-end training, activation checkpointing and local modules.
    --budget also says which of them fits into so much memory.
    -c FILE.yaml gives settings, named like flags; flags win over it.
    """

    backbone: ModelConfig = field(default_factory=ModelConfig)
    local: LocalConfig = field(default_factory=LocalConfig)
    batch_size: int = 32
    """Images per step."""
    micro_batches: int = 1
    """Equal parts of a batch that go through the modules one after the other."""
    opt: str = "adamw"
    """Any optimizer of timm, or adamw8bit, adamw4bit, adam8bit, adam4bit of torchao."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """fp32, or mixed precision: bf16 or fp16."""
    model_ema: bool = False
    """Keep a moving average of the weights."""
    offload_optimizer: bool = False
    """Keep the optimizer states of modules at rest in the host's memory."""
    offload_boundaries: bool = False
    """Keep the boundaries between modules of exact training in the host's memory."""
    num_classes: OptionalInt = None
    """Number of labels (default: the model's own)."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Whose kernels and speed to assume."""
    parallel: Annotated[Literal["modules"] | None, tyro.conf.arg(metavar="{modules}", help_behavior_hint="")] = None
    """Predict also what each process needs when modules are trained by several: modules. Needs --nproc."""
    nproc: OptionalInt = None
    """Processes for --parallel."""
    bandwidth: OptionalStr = None
    """Data per second from one process to another, 100MiB or 10GiB (default: a typical value for --device)."""
    explain: OptionalStr = None
    """Show the layer and the largest tensors at the peak of one setting of the table: K=4, end-to-end, ..."""
    json: OptionalPath = None
    """Write all numbers into this file as well."""
    picture: Path = Path("plan.png")
    """Where to draw the picture."""

    def __post_init__(self) -> None:
        require_within_bounds(self)
        require_equal_parts(self.batch_size, self.micro_batches)
        if self.parallel and self.nproc is None:
            raise ConfigError("--parallel needs --nproc, the number of processes")
        if not self.parallel and (self.nproc or self.bandwidth):
            raise ConfigError("--nproc and --bandwidth are for several processes; add --parallel modules")
        if self.parallel and self.local.finish:
            raise ConfigError("--finish trains in one process or on parts of batches; leave out --finish or --parallel")
        if self.parallel and self.local.budget is not None:
            raise ConfigError("--budget chooses for one process; leave out either --budget or --parallel")
        if self.bandwidth is not None:
            parse_bytes(self.bandwidth, "--bandwidth")
