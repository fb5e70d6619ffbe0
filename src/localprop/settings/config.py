"""What a training run is: frozen dataclasses, checked when they are built.

A flag of the command line, a key of a YAML file and a field here are the same word. Field docstrings are the help.
"""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from localprop.errors import ConfigError
from localprop.registry import DATASETS, TASKS
from localprop.settings.bounds import require_equal_parts, require_within_bounds
from localprop.settings.finish import finish_epochs, require_finish
from localprop.settings.recipe import Recipe
from localprop.settings.values import (
    OptionalFloat,
    OptionalInt,
    OptionalNames,
    OptionalPath,
    OptionalStr,
    Pairs,
    parse_bytes,
)

# The backbone where none is named: timm's Swin-Tiny, made small enough for images of 16 to 96 pixels.
DEFAULT_MODEL = "swin_tiny_patch4_window7_224"
PLACES = ("local-dir:", "hf-hub:", "hf_hub:")  # before a model's name that is the place of its weights
SMALL_SWIN = {"patch_size": 2, "window_size": 4, "embed_dim": 48, "depths": [2, 2], "num_heads": [3, 6]}
# Of what needs more than a line: tyro keeps a line break of a field's docstring.
_VAL_SPLIT_HELP = (
    "Part of the training images that is held out, the same in every run, and evaluated on instead of the test images: "
    "for choosing settings without looking at the test images."
)
_HOLD_HELP = (
    "Keep images that are held in memory on the training device: no transfers, the same batches. The peak memory that "
    "is shown is that of training, without them."
)
_MICRO_BATCHES_HELP = (
    "Equal parts of a batch that go through the modules one after another, before one step with the sum of their "
    "gradients: less memory and the same training, except that batch norm and contrastive losses see parts."
)
_INITIAL_HELP = (
    "Start from weights in a file (safetensors, or .pth without code), in a folder that `localprop export` or timm has "
    "written, or of a run."
)
_LORA_HELP = (
    "Rank of LoRA adapters: a trained pair of small layers beside each linear layer, and each convolution of a block; "
    "all else but the classifier is frozen."
)
_LORA_TARGETS_HELP = (
    "Names of layers that get adapters, of parts that hold them, or patterns: qkv, or blocks.[6-9] (default: all)."
)
_GRAPHS_HELP = (
    "Capture a training step as CUDA graphs, one for each module, and replay them: the same numbers, faster on small "
    "images. auto: on CUDA, where a step can be captured."
)
_PARALLEL_HELP = (
    "Train in several processes, started by --nproc or torchrun: modules (each process trains its own modules, with "
    "the same numbers; a multiple of --modules makes replicas that share every batch) or data (each process trains all "
    "modules on its part of every batch)."
)
_DATA_HELP = (
    f"{', '.join(name for name in DATASETS if name != 'synthetic')}, folder:PATH with train/ and test/ or val/ (with "
    "both, test/ is evaluated once, after training), or synthetic (random pixels, to measure memory and time)."
)


@dataclass(frozen=True)
class ModelConfig:
    """The model that is trained."""

    model: str = DEFAULT_MODEL
    """Name of a timm model, or of one that --plugin registers; or local-dir:FOLDER or hf-hub:NAME, with weights."""
    model_kwargs: Pairs = None
    """For the function that builds the model (default: a small Swin for the default model, else nothing)."""
    pretrained: bool = False
    """Start from timm's pretrained weights."""
    initial_checkpoint: Annotated[
        OptionalStr, tyro.conf.arg(metavar="FILE", help_behavior_hint="", help=_INITIAL_HELP)
    ] = None
    lora: Annotated[OptionalInt, tyro.conf.arg(metavar="RANK", help_behavior_hint="", help=_LORA_HELP)] = None
    lora_alpha: OptionalFloat = None
    """Scale of what adapters add, times the rank (default: the rank)."""
    lora_targets: Annotated[
        OptionalNames, tyro.conf.arg(metavar="NAME ...", help_behavior_hint="", help=_LORA_TARGETS_HELP)
    ] = None
    img_size: OptionalInt = None
    """Side of the square input in pixels (default: the dataset's; for a folder, the model's)."""
    drop_path: float = 0.0
    """Stochastic depth rate, for models that have it."""
    plugin: OptionalPath = None
    """A Python file to run first, which may register methods, heads, decoders, tasks, datasets and models."""

    def __post_init__(self) -> None:
        require_within_bounds(self)
        if self.lora is None and (self.lora_alpha is not None or self.lora_targets is not None):
            raise ConfigError("--lora-alpha and --lora-targets are about adapters; add --lora 8, their rank")

    @property
    def starts_trained(self) -> bool:
        """Whether training starts from weights that have been trained before."""
        return self.pretrained or self.initial_checkpoint is not None or self.model.startswith(PLACES)


@dataclass(frozen=True)
class LocalConfig(Recipe):
    """How the model is divided into local modules, and how they learn."""

    budget: OptionalStr = None
    """Memory to fit into, 8GiB or 500MiB: finds cuts and what runs again. Exact, unless local modules are asked for."""
    finish: float = 0.0
    """Part of the epochs, the last ones, in which the same modules are trained exactly: 0.1; 0 is off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None:
            parse_bytes(self.budget, "--budget")
        if self.finish and (self.end_to_end or self.count == 1):
            what = "--method end-to-end is exact from the first epoch on" if self.end_to_end else "there is one module"
            raise ConfigError(f"--finish is {self.finish:g}, but {what}; leave --finish out")

    @property
    def recipe(self) -> Recipe:
        """What the network is made of, without the budget."""
        return Recipe(**{f.name: getattr(self, f.name) for f in fields(Recipe)})


@dataclass(frozen=True)
class DataConfig:
    """What the model is trained on and evaluated on, and how images are augmented."""

    data: Annotated[str, tyro.conf.arg(help=_DATA_HELP)] = "digits"
    task: Annotated[str, tyro.conf.arg(help=f"What the network is trained for: {', '.join(TASKS)}.")] = "classification"
    data_dir: Path = Path("data")
    """Where torchvision's datasets are, or are downloaded to."""
    download: bool = False
    """Download the dataset if it is not there."""
    val_split: Annotated[float, tyro.conf.arg(help=_VAL_SPLIT_HELP)] = 0.0
    workers: int = 2
    """Processes that decode large images during training; 0 starts none, also none to decode small images before it."""
    hold_on_device: Annotated[bool, tyro.conf.arg(help=_HOLD_HELP)] = False
    crop_pad: OptionalInt = None
    """Padding in pixels before the random crop of small images (default: an eighth of the image; none below 16)."""
    hflip: OptionalFloat = None
    """Chance of a horizontal flip (default: 0.5, or 0 for digits and svhn)."""
    mixup: float = 0.0
    """Mixup alpha; 0 is off."""
    cutmix: float = 0.0
    """CutMix alpha; 0 is off."""
    smoothing: float = 0.1
    """Label smoothing."""
    bad_images: int = 10
    """Unreadable training images that are skipped before the run stops."""

    def __post_init__(self) -> None:
        require_within_bounds(self)


@dataclass(frozen=True)
class OptimConfig:
    """Steps, optimizer and learning rate."""

    epochs: int = 24
    """Epochs to train."""
    batch_size: int = 32
    """Images per step."""
    micro_batches: Annotated[int, tyro.conf.arg(help=_MICRO_BATCHES_HELP)] = 1
    opt: str = "adamw"
    """Any optimizer of timm, or adamw8bit, adamw4bit, adam8bit, adam4bit of torchao."""
    lr: float = 3e-3
    """Peak learning rate (with trained weights 1e-3, and a tenth of it for the backbone)."""
    backbone_lr_scale: float = 1.0
    """Times which --lr the backbone learns at; auxiliary nets and the classifier learn at --lr itself."""
    layer_decay: OptionalFloat = None
    """By what the learning rate is multiplied from each layer of the backbone to the one before: 0.75."""
    finish_lr: OptionalFloat = None
    """Peak learning rate of the epochs of --finish, which have a schedule of their own (default: half of --lr)."""
    weight_decay: float = 0.05
    """Weight decay, not applied to biases, norms and what the model exempts."""
    sched: str = "cosine"
    """Any scheduler of timm, stepped per update: cosine, tanh, poly, wsd, rsqrt, constant or none."""
    warmup_epochs: OptionalFloat = None
    """Epochs, or parts of one, in which the learning rate rises (default: a tenth of --epochs, at most 3)."""
    min_lr: float = 1e-6
    """Learning rate at the end of the schedule."""
    clip_grad: OptionalFloat = None
    """Largest gradient norm of a module; each is clipped alone, with --method end-to-end too."""
    model_ema: bool = False
    """Keep a moving average of the backbone's weights, and evaluate and save that."""
    model_ema_decay: float = 0.9998
    """Decay of the moving average per step."""
    amp: bool = False
    """Automatic mixed precision."""
    amp_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """Type of mixed precision; float16 needs CUDA."""
    offload_optimizer: bool = False
    """Keep the optimizer states of modules at rest in the host's memory; needs CUDA. Trains bit for bit the same."""
    offload_boundaries: bool = False
    """Keep the boundaries between modules of exact training in the host's memory; needs CUDA, and changes no bit."""

    def __post_init__(self) -> None:
        require_within_bounds(self)


@dataclass(frozen=True)
class RunConfig:
    """Where and how a run is computed, and what is saved."""

    output: Path = Path("runs")
    """Folder that holds the run folders."""
    experiment: OptionalStr = None
    """Name of the run folder (default: from date, data and method). A run never writes into an old one."""
    resume: OptionalStr = None
    """Resume a run: its folder, or nothing for the newest in --output."""
    seed: int = 42
    """Seed of weights, data order, augmentation and dropout."""
    device: OptionalStr = None
    """cpu, cuda, cuda:1, ... (default: cuda if there is one)."""
    compile: bool = False
    """Compile every local module with torch.compile: a slower start, then faster steps; needs a C++ compiler."""
    deterministic: bool = False
    """Use only torch's deterministic algorithms; on CUDA, attention over many tokens needs them to repeat exactly."""
    cuda_graphs: Annotated[Literal["auto", "on", "off"], tyro.conf.arg(help=_GRAPHS_HELP)] = "auto"
    steps: OptionalInt = None
    """Stop after this many steps in all, as at the end of a run; --resume continues, up to --epochs."""
    val_interval: int = 1
    """Evaluate after every so many epochs, and after the last."""
    checkpoint_steps: OptionalInt = None
    """Save a checkpoint every so many steps as well as after each epoch."""
    checkpoint_hist: int = 2
    """Checkpoints kept."""
    parallel: Annotated[
        Literal["modules", "data"] | None,
        tyro.conf.arg(metavar="{modules,data}", help_behavior_hint="", help=_PARALLEL_HELP),
    ] = None
    nproc: OptionalInt = None
    """Processes for --parallel on this machine; where there are fewer than modules, consecutive ones share one."""
    trace: bool = False
    """Record when each process of --parallel computes, waits and sends: trace.json and timeline.png."""

    def __post_init__(self) -> None:
        require_within_bounds(self)


@dataclass(frozen=True)
class TrainConfig:
    """Train a model by local learning.

    Without options: a small Swin on handwritten digits.
    -c FILE.yaml gives settings, named like flags; flags win over it.
    """

    backbone: ModelConfig = field(default_factory=ModelConfig)
    local: LocalConfig = field(default_factory=LocalConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        optim, run = self.optim, self.run
        require_equal_parts(optim.batch_size, optim.micro_batches)
        require_finish(self.local.finish, optim.epochs, optim.finish_lr, run.parallel)
        if optim.warmup_epochs is not None and optim.warmup_epochs > self.before_finish.epochs:
            words = (
                f"the {self.before_finish.epochs} before --finish" if self.local.finish else f"--epochs {optim.epochs}"
            )
            raise ConfigError(f"--warmup-epochs is {optim.warmup_epochs:g}, longer than {words}")
        if run.nproc is not None and run.parallel is None:
            raise ConfigError(f"--nproc is {run.nproc}, but nothing is parallel; add --parallel modules")
        if run.parallel == "modules" and self.local.end_to_end and (self.local.count or 1) > 1:
            raise ConfigError(
                "--parallel modules trains local modules, and those of --method end-to-end wait for each other; choose "
                "--parallel data"
            )
        exact = self.local.finish or (self.local.end_to_end and (self.local.budget or (self.local.count or 1) > 1))
        if optim.offload_boundaries and not exact:
            raise ConfigError(
                "--offload-boundaries is for exact training in several modules; leave it out, or add --method "
                "end-to-end --modules 4"
            )
        if run.trace and run.parallel is None:
            raise ConfigError("--trace shows what several processes do; add --parallel modules --nproc 2")

    @property
    def finish_epochs(self) -> int:
        """How many of the epochs, the last ones, are exact training."""
        return finish_epochs(self.local.finish, self.optim.epochs)

    @property
    def before_finish(self) -> OptimConfig:
        """How the epochs before these are trained; without a finish all."""
        return replace(self.optim, epochs=self.optim.epochs - self.finish_epochs)

    @property
    def in_finish(self) -> OptimConfig:
        """How these are trained: with a schedule of their own, and its usual warm-up."""
        peak = self.optim.lr / 2 if self.optim.finish_lr is None else self.optim.finish_lr
        return replace(self.optim, epochs=self.finish_epochs, lr=peak, warmup_epochs=None)
