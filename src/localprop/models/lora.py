"""LoRA adapters through peft: beside frozen layers, trained pairs of small ones (Hu et al., ICLR 2022)."""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from localprop.errors import ChainError, ConfigError, NonFiniteWeightError, first_line, listing, suggestion
from localprop.models.loading import classifiers
from localprop.system.extras import import_extra
from localprop.tracing.blocks import block_names, has_adapters, is_adapted
from localprop.tracing.constants import KeepConstants
from localprop.tracing.copies import fake_copy
from localprop.tracing.modes import no_logging
from localprop.tracing.reasons import why_no_chain
from localprop.tracing.sizes import own_input_size

_ADAPTABLE = "a linear layer, or a convolution of one group without dilation, which the model calls and nothing shares"


def add_lora(
    model: nn.Module,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    input_size: tuple[int, int, int] | None = None,
) -> nn.Module:
    """Gives layers of a model LoRA adapters, and freezes all else but the classifier; the model itself is changed.

    A layer of the weight W then computes with W + alpha / rank * B A. A and B are trained; B is zero at first. So the
    model computes what it did before.

    Args:
        model: an image model, which `localize` may divide afterwards.
        rank: rows of A and columns of B.
        alpha: see above; default: `rank`.
        targets: names of layers (also their ends, such as qkv), of parts that hold layers, or patterns of either;
            default: all linear layers but the classifier, and convolutions within blocks, or, where the model has no
            blocks, anywhere.
        input_size: (channels, height, width) of the images; default: what the model says of itself.

    Returns:
        The model.

    Raises:
        ConfigError: peft is missing, the model has adapters already, or a target names no layer that can have one.
        ChainError: the model does not run.
    """
    if not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"the rank of LoRA is {rank!r}; it must be a whole number, at least 1")
    if has_adapters(model):
        raise ConfigError("the model has adapters already; merge them first, with localprop.merge_lora(model)")
    peft = import_extra("peft", "lora", "LoRA")
    names = _targets(model, targets, input_size)
    pattern = "|".join(map(re.escape, names))  # a regular expression: peft takes the ends of plain names
    config = peft.LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=pattern)
    try:
        peft.inject_adapter_in_model(config, model)
    except ImportError as error:  # peft looks for other libraries, and some versions do not fit theirs
        raise ConfigError(f"peft cannot be used ({first_line(error)}); pip install -U 'localprop[lora]'") from None
    for _, layer in _adapted(model):
        # Its adapter has the weight's type. Under autocast peft would make a copy of the input in float32, and autocast
        # another one back.
        layer.cast_input_dtype_enabled = False
    for name in classifiers(model):
        model.get_submodule(name).requires_grad_(True)
    return model


def merge_lora(model: nn.Module) -> nn.Module:
    """Adds adapters to the weights that they stand beside: the model is a plain one again, all of it to be trained.

    Args:
        model: a model with adapters, of `add_lora` or any that peft can merge.

    Returns:
        The model. Its predictions differ from those before by rounding.

    Raises:
        NonFiniteWeightError: a weight would be NaN or infinite.
    """
    for name, layer in list(_adapted(model)):
        model.set_submodule(name, _merged(name, layer))
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model.requires_grad_(True)


def merged_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `merge_lora` would make of a state dict.

    Args:
        model: a model with adapters, whose own weights are neither looked at nor changed.
        weights: its state dict.

    Raises:
        NonFiniteWeightError: a weight would be NaN or infinite.
    """
    result = dict(weights)
    for name, layer in _adapted(model):
        start = f"{name}."
        own = {key.removeprefix(start): result.pop(key) for key in weights if key.startswith(start)}
        layer = copy.deepcopy(layer)
        layer.load_state_dict(own, assign=True)
        result |= {start + leaf: tensor for leaf, tensor in _merged(name, layer).state_dict().items()}
    return result


def lora_note(model: nn.Module, rank: int) -> str:
    """A line for the user that says what is trained of a model with adapters."""
    count, sizes = sum(1 for _ in _adapted(model)), [(p.requires_grad, p.numel()) for p in model.parameters()]
    trained = sum(size for requires_grad, size in sizes if requires_grad)
    every = sum(size for _, size in sizes)
    return f"LoRA of rank {rank} beside {count} layers: {trained:,} of the backbone's {every:,} parameters are trained"


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers with adapters, by name."""
    return ((name, module) for name, module in model.named_modules() if is_adapted(module))


def _merged(name: str, layer: Any) -> nn.Module:
    """The layer that an adapter stands beside, with the adapter in a new weight."""
    try:
        with torch.no_grad():
            layer.merge(safe_merge=True)
    except ValueError as error:
        raise NonFiniteWeightError(f"the adapter of {name} cannot be merged ({error}); lower --lr") from None
    own: nn.Module = layer.get_base_layer()
    return own


def _targets(model: nn.Module, patterns: Sequence[str] | None, input_size: tuple[int, int, int] | None) -> list[str]:
    """Names of the layers that get adapters; see `add_lora`."""
    heads = classifiers(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    called, alone = _called(model, input_size), _unshared(model)
    fitting = [n for n, layer in layers.items() if n not in heads and n in called and n in alone and _fits(layer)]
    if patterns is None:
        blocks = block_names(model)
        inside = {n for n in fitting if not blocks or any(n.startswith(f"{block}.") for block in blocks)}
        fitting = [n for n in fitting if n in inside or isinstance(layers[n], nn.Linear)]
    for pattern in patterns or ():
        found = [name for name in layers if _is_meant(name, pattern)]
        if not found:
            ends = {name.rpartition(".")[2]: None for name in layers}
            raise ConfigError(f"no layer is called {pattern!r}; {suggestion(pattern, [*ends, *layers])}")
        if not set(found) & set(fitting):
            why = "the classifier is trained as a whole" if heads.issuperset(found) else f"that takes {_ADAPTABLE}"
            raise ConfigError(f"{listing(found, 3)} can have no LoRA adapter: {why}; name other targets")
    if patterns is not None:
        fitting = [name for name in fitting if any(_is_meant(name, pattern) for pattern in patterns)]
    if not fitting:
        raise ConfigError(f"{type(model).__name__} has no layer for LoRA: that takes {_ADAPTABLE}")
    return fitting


def _is_meant(name: str, pattern: str) -> bool:
    """Whether a target means a layer: its name, the end of it, or a part that holds it."""
    parts = name.split(".")
    ways = [".".join(own) for i in range(len(parts)) for own in (parts[: i + 1], parts[i:])]
    return any(fnmatchcase(way, pattern) for way in ways)


def _fits(layer: nn.Module) -> bool:
    """Whether peft's adapter of a layer can be merged into its weight: a subclass may make another use of that."""
    if isinstance(layer, nn.Conv2d):
        plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
        return plain and type(layer) in (nn.Conv2d, Conv2dSame)
    return type(layer) is nn.Linear


def _unshared(model: nn.Module) -> set[str]:
    """Names of the modules that the model has in one place, and whose parameters no other module has."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            names.setdefault(id(parameter), []).append(name)
    shared = {name for own in names.values() if len(own) > 1 for name in own}
    return {name for own in names.values() for name in own} - shared


def _called(model: nn.Module, input_size: tuple[int, int, int] | None) -> set[str]:
    """Names of the layers whose forward runs, in train and in eval mode.

    Some models use the weight of a layer and never call it (the qkv of Swin V2): an adapter there would do nothing.
    """
    size, mode = input_size or own_input_size(model), FakeTensorMode(allow_non_fake_inputs=True)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    called: dict[bool, set[str]] = {True: set(), False: set()}
    try:
        with no_logging("torch._subclasses.fake_tensor"):
            duplicate = fake_copy(model, mode)
            for name, module in duplicate.named_modules():
                note = _noting(called, name)
                module.register_forward_hook(note)
            with mode, torch.no_grad(), KeepConstants():
                for training in (True, False):
                    duplicate.train(training)(torch.empty(2, *size, dtype=dtype))
    except Exception as error:  # a model's own code may raise anything at all
        raise ChainError(f"cannot add adapters to {type(model).__name__}: {why_no_chain(error)}") from error
    return called[True] & called[False]


def _noting(called: dict[bool, set[str]], name: str) -> Any:
    return lambda module, *_: called[module.training].add(name)
