"""From the name of a model to a backbone."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from localprop.errors import ConfigError, first_line
from localprop.models import timm
from localprop.registry import MODELS
from localprop.settings.config import DEFAULT_MODEL, ModelConfig
from localprop.system.plugins import load_plugin


def create_backbone(config: ModelConfig, num_classes: int | None) -> tuple[nn.Module, dict[str, Any]]:
    """Builds a model.

    Args:
        config: its name and settings.
        num_classes: number of classes of the data; None leaves it to the model.

    Returns:
        The model, and the arguments that it was built with beside pretrained.

    Raises:
        ConfigError: no such model, an argument that it does not take, or pretrained weights that cannot be loaded.
    """
    load_plugin(config.plugin)
    kwargs: dict[str, Any] = dict(config.model_kwargs or {})
    if num_classes is not None and kwargs.setdefault("num_classes", num_classes) != num_classes:
        raise ConfigError(
            f"--model-kwargs num_classes={kwargs['num_classes']}: the data has {num_classes}; leave it out"
        )
    if config.drop_path:
        kwargs["drop_path_rate"] = config.drop_path
    attempts = [kwargs]
    if config.img_size is not None and "img_size" not in kwargs:
        # Convolutional models take images of any size and have no such argument.
        attempts.insert(0, {**kwargs, "img_size": config.img_size})
    build = _builder(config)
    for attempt in attempts:
        try:
            model = build(**attempt)
        except TypeError as error:
            if "img_size" in str(error) and attempt is not attempts[-1]:
                continue
            line = str(error).partition("\n")[0]  # torch adds where in its own code it was
            raise ConfigError(f"{config.model} cannot be built with --model-kwargs {kwargs}: {line}") from None
        except Exception as error:  # whatever a model's own code, or the hub's client, may raise
            raise _failure(config, attempt, error) from None
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model {config.model!r} is built as a {type(model).__name__}; return a torch module")
        return model, attempt
    raise AssertionError("unreachable")


def native_size(config: ModelConfig) -> int | None:
    """The side in pixels of the images that a model was made for; None where any size suits or nothing is known."""
    small_swin = config.model == DEFAULT_MODEL and not config.pretrained
    return None if small_swin or config.model in MODELS else timm.native_size(config.model)


def _builder(config: ModelConfig) -> Callable[..., nn.Module]:
    """The function that builds the model: a plugin's own, or timm's."""
    name = config.model
    if name in MODELS:
        if timm.has_model(name) and timm.model_function(name) is not MODELS[name]:
            raise ConfigError(f"timm has a model called {name!r}; register yours under another name")
        return partial(MODELS[name], pretrained=True) if config.pretrained else MODELS[name]
    if not timm.has_model(name):
        raise ConfigError(f"no model is called {name!r}; {timm.suggestion_of_model(name, MODELS)}")
    return partial(timm.create_model, name, pretrained=config.pretrained)


def _failure(config: ModelConfig, arguments: dict[str, Any], error: Exception) -> ConfigError:
    line = first_line(error)
    if config.pretrained:
        return ConfigError(
            f"the pretrained weights of {config.model} cannot be loaded ({line}); go online once, put them into "
            "the Hugging Face cache, or leave out --pretrained"
        )
    return ConfigError(f"{config.model} cannot be built with {arguments}: {line}")
