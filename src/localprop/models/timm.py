"""timm's models, and those that a plugin has added to timm."""

from collections.abc import Callable, Iterable

import timm
from timm import create_model
from torch import nn

from localprop.errors import suggestion

__all__ = ["create_model", "has_model", "model_function", "native_size", "suggestion_of_model"]

_USUAL_SIDE = 224


def has_model(name: str) -> bool:
    """Whether timm knows a model of that name."""
    return timm.is_model(name)


def model_function(name: str) -> Callable[..., nn.Module]:
    """The function with which timm builds the model."""
    return timm.model_entrypoint(name)


def native_size(name: str) -> int:
    """The side in pixels of the images that a model was made for; 224 where timm does not say."""
    try:
        settings = timm.get_pretrained_cfg(name)
    except RuntimeError:
        settings = None
    return settings.input_size[-1] if settings else _USUAL_SIDE


def suggestion_of_model(name: str, also: Iterable[str] = ()) -> str:
    """What a misspelt model's name may have meant; `also` are names that timm does not know."""
    hint = suggestion(name, [*timm.list_models(), *also])
    return hint if hint.startswith("did") else "see timm.list_models()"
