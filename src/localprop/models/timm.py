"""timm's models, and those that a plugin has added to timm."""

from collections.abc import Callable, Iterable, Sequence

import timm
from timm import create_model
from torch import nn

from localprop.errors import suggestion

__all__ = [
    "create_model",
    "has_model",
    "is_timms_own",
    "model_function",
    "native_size",
    "place_of_weights",
    "suggestion_of_model",
]

_USUAL_SIDE = 224
_FILES = ("model.safetensors", "pytorch_model.bin")


def has_model(name: str) -> bool:
    """Whether timm knows a model of that name."""
    return timm.is_model(name)


def model_function(name: str) -> Callable[..., nn.Module]:
    """The function with which timm builds the model."""
    return timm.model_entrypoint(name)


def is_timms_own(name: str) -> bool:
    """Whether timm ships the model, so that its weights come through timm's own loader."""
    return timm.model_entrypoint(name).__module__.partition(".")[0] == "timm"


def place_of_weights(name: str) -> tuple[str | None, Sequence[str], str | None]:
    """Where a model's pretrained weights are: a repository of the Hub, its files of which one will do, and an address.

    All are empty where timm has none.
    """
    settings = timm.get_pretrained_cfg(name)
    if settings is None or settings.file:
        return None, (), None
    own = settings.hf_hub_filename
    return settings.hf_hub_id, [own] if own else _FILES, settings.url if isinstance(settings.url, str) else None


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
