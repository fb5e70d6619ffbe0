"""From the name of a model to a backbone."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from localprop.errors import ConfigError, LocalpropError, first_line
from localprop.models import timm
from localprop.models.hub import require_reachable
from localprop.models.loading import Loading
from localprop.models.lora import add_lora, lora_note
from localprop.models.sources import Source
from localprop.registry import MODELS
from localprop.settings.config import DEFAULT_MODEL, ModelConfig
from localprop.settings.trust import DESCRIPTIONS
from localprop.system.plugins import load_plugin


class Backbone(NamedTuple):
    """A model that has been built.

    Attributes:
        model: itself.
        kwargs: the arguments that it was built with, beside those that say which weights it starts from.
        notes: lines that say which of its tensors were loaded, where that is known, and which are trained beside
            adapters.
    """

    model: nn.Module
    kwargs: dict[str, Any]
    notes: Sequence[str] = ()


def create_backbone(config: ModelConfig, num_classes: int | None, source: Source | None = None) -> Backbone:
    """Builds a model, with adapters where the settings ask for them.

    Args:
        config: its name and settings.
        num_classes: number of classes of the data; None leaves it to the model.
        source: weights to load; None for random ones, or timm's own where the settings say so.

    Raises:
        ConfigError: no such model, an argument that it does not take, weights that cannot be had or do not fit, or
            adapters that it cannot have.
        NonFiniteWeightError: a weight of the source is NaN or infinite.
    """
    load_plugin(config.plugin)
    kwargs: dict[str, Any] = dict(config.model_kwargs or {})
    if num_classes is not None and kwargs.setdefault("num_classes", num_classes) != num_classes:
        raise ConfigError(
            f"--model-kwargs num_classes={kwargs['num_classes']}: the data has {num_classes}; leave it out"
        )
    if config.drop_path:
        kwargs["drop_path_rate"] = config.drop_path
    loading = _loading(config, source)
    model, kwargs = _build(config, kwargs, loading)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model {config.model!r} is built as a {type(model).__name__}; return a torch module")
    if loading and loading.tensors is not None and loading.total is None:
        loading.fill(model, loading.tensors)
    notes = [loading.note] if loading and loading.note else []
    if config.lora:
        notes.append(lora_note(with_adapters(model, config), config.lora))
    return Backbone(model, kwargs, notes)


def with_adapters(model: nn.Module, config: ModelConfig) -> nn.Module:
    """A model with the adapters that settings ask for, which it is given in place; errors as of `add_lora`."""
    size = (3, config.img_size, config.img_size) if config.img_size else None
    assert config.lora is not None
    return add_lora(model, config.lora, config.lora_alpha, config.lora_targets, size)


def _loading(config: ModelConfig, source: Source | None) -> Loading | None:
    """The weights that the model is to be built with; None for random ones."""
    if source is not None:
        return Loading(source.place, config.model, source.tensors())
    if not config.pretrained or config.model in MODELS:
        return None
    if not any(name in (config.model_kwargs or {}) for name in DESCRIPTIONS):
        repository, files, url = timm.place_of_weights(config.model)
        require_reachable(f"the pretrained weights of {config.model}", repository, files, url)
    return Loading(f"timm's {config.model}", config.model)


def _build(config: ModelConfig, kwargs: dict[str, Any], loading: Loading | None) -> tuple[Any, dict[str, Any]]:
    """The model, and the arguments that were used."""
    attempts = [kwargs]
    if config.img_size is not None and "img_size" not in kwargs:
        # Convolutional models take images of any size and have no such argument.
        attempts.insert(0, {**kwargs, "img_size": config.img_size})
    build = _builder(config, loading)
    for attempt in attempts:
        try:
            with loading.in_timm() if loading else nullcontext():
                return build(**attempt), attempt
        except LocalpropError:
            raise
        except TypeError as error:
            if "img_size" in str(error) and attempt is not attempts[-1]:
                continue
            line = str(error).partition("\n")[0]  # torch adds where in its own code it was
            raise ConfigError(f"{config.model} cannot be built with --model-kwargs {kwargs}: {line}") from None
        except Exception as error:  # whatever a model's own code, or the hub's client, may raise
            raise _failure(config, attempt, error, loading) from None
    raise AssertionError("unreachable")


def native_size(config: ModelConfig, source: Source | None = None) -> int | None:
    """The side in pixels of the images that a model was made for; None where any size suits or nothing is known."""
    size = source.settings.get("input_size") if source else None
    if isinstance(size, (list, tuple)) and size and type(size[-1]) is int and size[-1] > 0:
        return size[-1]
    small_swin = config.model == DEFAULT_MODEL and not config.pretrained and not source
    return None if small_swin or config.model in MODELS else timm.native_size(config.model)


def _builder(config: ModelConfig, loading: Loading | None) -> Callable[..., Any]:
    """The function that builds the model: a plugin's own, or timm's."""
    name = config.model
    if name in MODELS:
        if timm.has_model(name) and timm.model_function(name) is not MODELS[name]:
            raise ConfigError(f"timm has a model called {name!r}; register yours under another name")
        return partial(MODELS[name], pretrained=True) if config.pretrained else MODELS[name]
    if not timm.has_model(name):
        raise ConfigError(f"no model is called {name!r}; {timm.suggestion_of_model(name, MODELS)}")
    _refuse_passed_over(config)
    # A plugin's function does not load through timm, so it gets its weights when it is built.
    loads = config.pretrained or (loading is not None and timm.is_timms_own(name))
    return partial(timm.create_model, name, pretrained=loads)


def _refuse_passed_over(config: ModelConfig) -> None:
    """Refuses timm's own ways to name weights where timm passes them over, or loads what fits of any model's."""
    for argument in DESCRIPTIONS:
        value = (config.model_kwargs or {}).get(argument)
        named = value if isinstance(value, dict) else {}
        if named.get("file") and not named.get("custom_load"):
            raise ConfigError(
                f"--model-kwargs {argument} names a file of weights; write --initial-checkpoint {named['file']}"
            )
        if any(named.get(key) for key in ("file", "url", "hf_hub_id")) and not config.pretrained:
            raise ConfigError(f"--model-kwargs {argument} names weights that are not loaded; add --pretrained")


def _failure(config: ModelConfig, arguments: dict[str, Any], error: Exception, loading: Loading | None) -> ConfigError:
    line = first_line(error)
    if config.pretrained:
        return ConfigError(
            f"the pretrained weights of {config.model} cannot be loaded ({line}); put them into the Hugging Face "
            "cache, or name weights that you have: --initial-checkpoint FILE"
        )
    if loading:
        what = f"{type(error).__name__}: {line}"
        return ConfigError(f"{loading.place} does not fit {config.model} ({what}); name its model with --model")
    return ConfigError(f"{config.model} cannot be built with {arguments}: {line}")
