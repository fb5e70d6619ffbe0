"""The optimizer of a local module and its learning rate schedule: timm's, and low-bit ones of torchao."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from localprop.errors import ConfigError, suggestion
from localprop.models.loading import classifiers
from localprop.network.network import LocalNetwork
from localprop.settings.config import OptimConfig
from localprop.system.extras import import_extra

# timm also has step and multistep, whose usual milestones lie beyond the end of a short run.
SCHEDULERS = ("cosine", "tanh", "constant", "poly", "wsd", "rsqrt", "none")
LOW_BIT = {"adamw8bit": "AdamW8bit", "adamw4bit": "AdamW4bit", "adam8bit": "Adam8bit", "adam4bit": "Adam4bit"}
"""Flag to class of torchao: Adam whose moments take 8 or 4 bits, in tensors of 4096 elements and more."""
_LOW_BIT_FROM = 4096


def create_optimizers(net: LocalNetwork, modules: range, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """The optimizers of some modules of a network; errors as of `create_optimizer`."""
    scales = lr_scales(net, config)
    return [create_optimizer(net.local_modules[k], config, scales) for k in modules]


def lr_scales(net: LocalNetwork, config: OptimConfig) -> Mapping[nn.Parameter, float]:
    """By what the learning rate of each of the backbone's parameters is multiplied; none where all factors are 1.

    `layer_decay` counts layers as `timm.optim.param_groups_layer_decay` does, over the whole backbone; of a model that
    is not timm's the units are the layers. The classifier is no part of what `backbone_lr_scale` scales. A local loss
    may have a `rate` for its module's share.
    """
    slow = {
        parameter: module.local_loss.rate
        for module in net.local_modules
        if module.local_loss.rate != 1
        for unit in module.own_units
        for parameter in unit.used(net.backbone, nn.Module.parameters)
    }
    if config.backbone_lr_scale == 1 and config.layer_decay is None and not slow:
        return {}
    parameters = dict(net.backbone.named_parameters())
    layers, heads = _layers(net), classifiers(net.backbone)
    last, decay = max(layers.values(), default=0), config.layer_decay or 1.0
    return {
        parameter: decay ** (last - layers.get(name, last))
        * (1.0 if name.rpartition(".")[0] in heads else config.backbone_lr_scale)
        * slow.get(parameter, 1.0)
        for name, parameter in parameters.items()
    }


def _layers(net: LocalNetwork) -> Mapping[str, int]:
    """The number of each parameter's layer, from the input on, by name."""
    matcher: Callable[..., Any] | None = getattr(net.backbone, "group_matcher", None)
    if matcher:
        numbers: dict[str, int] = group_parameters(net.backbone, matcher(coarse=False), reverse=True)
        return numbers
    units = [unit for module in net.local_modules for unit in module.own_units]
    own = {id(p): i for i, unit in enumerate(units) for p in unit.used(net.backbone, nn.Module.parameters)}
    return {name: own[id(p)] for name, p in net.backbone.named_parameters() if id(p) in own}


def create_optimizer(
    module: nn.Module, config: OptimConfig, scales: Mapping[nn.Parameter, float] | None = None
) -> torch.optim.Optimizer:
    """The optimizer of one local module; no weight decay on biases, norms and `module.no_weight_decay()`.

    Args:
        module: the module.
        config: the settings.
        scales: see `lr_scales`. A group of parameters has its factor as `lr_scale`, which timm's schedules know.

    Raises:
        ConfigError: no optimizer of that name, or the library it needs is missing.
    """
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return torch.optim.SGD([{"params": []}], lr=config.lr)  # nothing to step, but a learning rate to schedule
    if config.opt in LOW_BIT:
        return _low_bit(module, config, scales)
    known = [str(name) for name in list_optimizers()]
    if config.opt not in known:
        hint = suggestion(config.opt, [*known, *LOW_BIT])
        raise ConfigError(f"--opt {config.opt!r} is no optimizer of timm or torchao; {hint}")
    kind, device = get_optimizer_class(config.opt, False), next(module.parameters()).device
    options = inspect.signature(kind).parameters
    # PyTorch's own optimizers have a fused step, six times as fast for a small network on a CPU.
    chosen = {"fused": "fused" in options and _fused_works(config.opt, device.type)}
    # Needed for CUDA graphs; without them it changes nothing.
    chosen["capturable"] = chosen["fused"] and "capturable" in options and device.type == "cuda"
    given: dict[str, Any] = {name: True for name, value in chosen.items() if value}
    if scales:
        given["param_group_fn"] = lambda own: _groups(own, config, scales)
    try:
        optimizer = create_optimizer_v2(module, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay, **given)
    except (AssertionError, ImportError) as error:
        raise ConfigError(f"--opt {config.opt} needs a library that is missing ({error}); choose another") from None
    if isinstance(optimizer, torch.optim.SGD) and chosen["fused"] and config.amp and config.amp_dtype == "float16":
        _begin_momentum(optimizer)
    return optimizer


def _groups(
    module: nn.Module, config: OptimConfig, scales: Mapping[nn.Parameter, float] | None
) -> list[dict[str, Any]]:
    """The parameters in groups of one weight decay and one factor of the learning rate."""
    exempt: set[str] = getattr(module, "no_weight_decay", set)()
    groups = param_groups_weight_decay(module, config.weight_decay, no_weight_decay_list=exempt)
    if not scales:
        return groups
    divided = []
    for group in groups:
        own: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            own.setdefault(scales.get(parameter, 1.0), []).append(parameter)
        divided += [{**group, "params": params, "lr_scale": scale} for scale, params in own.items()]
    return divided


def _begin_momentum(optimizer: torch.optim.SGD) -> None:
    """Lets momentum begin at 0, which gives the same first step.

    Torch's fused SGD allocates momentum in its first step. If a loss scale that is too large skips that step, momentum
    is not initialized, and the next step adds to it.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


@cache
def _fused_works(opt: str, device: str) -> bool:
    """Whether an optimizer's fused step exists on a type of device: Adagrad's does on CUDA in later versions only."""
    if device != "cuda":
        return True
    parameter = nn.Parameter(torch.zeros(1, device=device))
    parameter.grad = torch.zeros_like(parameter)
    try:
        create_optimizer_v2([parameter], opt=opt, lr=0.1, fused=True).step()
    except RuntimeError:
        return False
    return True


def masks_its_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer reads a tensor `found_inf` on its device, and skips its step where that is 1."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


class RatesOnDevice:
    """Learning rates of optimizers as tensors on their device, where a CUDA graph reads what a schedule has set.

    Args:
        optimizers: whose learning rates are numbers.
        device: where their parameters are.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], device: torch.device) -> None:
        self._optimizers = optimizers
        self._numbers = [float(group["lr"]) for group in self._groups()]
        self._tensors = [torch.zeros((), device=device) for _ in self._numbers]
        for optimizer in optimizers:
            # Else torch warns that a step that could be captured is not.
            optimizer._warned_capturable_if_run_uncaptured = True

    def set(self) -> None:
        """Replaces the numbers that a schedule or a checkpoint has set by tensors."""
        for place, (group, tensor) in enumerate(zip(self._groups(), self._tensors, strict=True)):
            if group["lr"] is not tensor:
                self._numbers[place] = group["lr"]
                group["lr"] = tensor.fill_(group["lr"])

    def unset(self) -> None:
        """Puts the numbers back, as a checkpoint has them."""
        for group, number in zip(self._groups(), self._numbers, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"] = number

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]


def create_scheduler(optimizer: torch.optim.Optimizer, config: OptimConfig, steps_per_epoch: int) -> Any:
    """The schedule of an optimizer's learning rate, stepped per update; None for "none".

    Raises:
        ConfigError: no schedule of that name.
    """
    if config.sched not in SCHEDULERS:
        raise ConfigError(f"--sched {config.sched!r} is no schedule; {suggestion(config.sched, SCHEDULERS)}")
    warmup = config.warmup_epochs if config.warmup_epochs is not None else min(3, config.epochs / 10)
    if config.sched in ("rsqrt", "wsd") and not 0 < warmup < config.epochs:
        raise ConfigError(f"--sched {config.sched} needs a warm-up shorter than the run; set --warmup-epochs")
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.sched,
        # In updates, or else timm takes whole epochs of warm-up only.
        num_epochs=config.epochs * steps_per_epoch,
        warmup_epochs=round(warmup * steps_per_epoch),
        min_lr=config.min_lr,
        warmup_lr=min(1e-5, config.lr),
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    if scheduler is None:
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
    return scheduler


@cache
def fill_tables(opt: str) -> None:
    """Steps an optimizer once on real tensors, if it is a low-bit one; call it before it steps on fake ones.

    torchao computes the tables by which it quantizes at the first step, and keeps them: of fake tensors they would be
    without meaning, for every later optimizer of the process.
    """
    if opt in LOW_BIT:
        module = nn.Module()
        module.weight = nn.Parameter(torch.zeros(1, _LOW_BIT_FROM))  # no random numbers are drawn for it
        module.weight.grad = torch.zeros_like(module.weight)
        _low_bit(module, OptimConfig(opt=opt)).step()


def _low_bit(
    module: nn.Module, config: OptimConfig, scales: Mapping[nn.Parameter, float] | None = None
) -> torch.optim.Optimizer:
    kinds = import_extra("torchao.optim", "lowbit", f"--opt {config.opt}", ", or choose --opt adamw")

    class LowBit(getattr(kinds, LOW_BIT[config.opt])):  # type: ignore[misc]
        """torchao's class, whose learning rate is a number between steps, as schedules and checkpoints have it."""

        def add_param_group(self, param_group: dict[str, Any]) -> None:
            torch.optim.Optimizer.add_param_group(self, param_group)

        def step(self, closure: Callable[[], float] | None = None) -> Any:
            rates = [group["lr"] for group in self.param_groups]
            # torchao compiles a step for every shape of a parameter: for the small Swin a minute on a CPU, for
            # steps a third as long.
            on_cpu = self.param_groups[0]["params"][0].device.type == "cpu"
            try:
                for group in self.param_groups:
                    group["lr"] = torch.tensor(group["lr"], dtype=torch.float32)
                with torch.compiler.set_stance("force_eager" if on_cpu else "default"):
                    return super().step(closure)
            finally:
                for group, rate in zip(self.param_groups, rates, strict=True):
                    group["lr"] = rate

    return LowBit(_groups(module, config, scales), lr=config.lr, weight_decay=config.weight_decay)
