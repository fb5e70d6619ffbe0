"""A run that starts from trained weights: whether it changes them, and its learning rates."""

from collections.abc import Collection
from dataclasses import replace

from localprop.settings.config import ModelConfig, TrainConfig
from localprop.settings.recipe import ALL

_LR, _SCALE = 1e-3, 0.1
_HIGH = 1e-3
"""A learning rate at which trained weights usually lose what they have learned."""


def fine_tunes(backbone: ModelConfig) -> bool:
    """Whether training starts from trained weights and changes these, not adapters beside them."""
    return backbone.starts_trained and not backbone.lora


def with_usual_rates(config: TrainConfig, named: Collection[str]) -> TrainConfig:
    """The settings with the usual rates of fine-tuning, where training starts from trained weights.

    Args:
        config: the settings.
        named: settings that the user has named. A learning rate that is named is everything's, unless the scale is
            named, too. So is that of adapters, which are as new as heads are.
    """
    if not config.backbone.starts_trained or "lr" in named:
        return config
    optim = replace(config.optim, lr=_LR)
    if "backbone_lr_scale" not in named and not config.backbone.lora:
        optim = replace(optim, backbone_lr_scale=_SCALE)
    return replace(config, optim=optim)


def rate_notes(config: TrainConfig) -> list[str]:
    """What is to be said of the learning rates of a run that begins, or of weights that do not learn."""
    optim, backbone = config.optim, config.optim.lr * config.optim.backbone_lr_scale
    if config.backbone.lora:
        random = "--lora freezes random weights; start from trained ones: --initial-checkpoint FILE, or --pretrained"
        return [] if config.backbone.starts_trained else [random]
    if not config.backbone.starts_trained or ALL in (config.local.freeze or ()):
        return []
    if backbone >= _HIGH:
        return [
            f"trained weights usually lose what they have learned at a learning rate of {backbone:g}; choose --lr "
            f"{_HIGH / 10:g}, or --backbone-lr-scale {_HIGH / 10 / optim.lr:.2g}"
        ]
    return (
        [f"learning rate {backbone:g}; of auxiliary nets and the classifier {optim.lr:g}"]
        if backbone < optim.lr
        else []
    )
