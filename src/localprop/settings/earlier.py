"""What a run of an earlier version did where it recorded nothing: a later default changes no old run.

A setting that is added gets a line in `NEWER`, with the value that stands for what was done before it existed; an
option of a method whose default changes keeps its old value in `OPTIONS_OF_0_1`. An option that is added gets a line in
`NEWER_OPTIONS`.
"""

from typing import Any

NEWER: dict[str, Any] = {
    "task": "classification",
    "steps": None,
    "recompute_units": None,
    "head_kwargs": None,
    "kinetic": 0.0,
    "cuda_graphs": "off",
    "deterministic": False,
    "reach": 0,
    "initial_checkpoint": None,
    "offload_boundaries": False,
    "finish": 0.0,
    "finish_lr": None,
    "backbone_lr_scale": 1.0,
    "layer_decay": None,
    "freeze": None,
    "freeze_modules": 0,
    "lora": None,
    "lora_alpha": None,
    "lora_targets": None,
}
"""Settings that version 0.1 did not have, and what they were then."""

SETTINGS_OF_0_1: dict[str, Any] = {
    "model": "swin_tiny_patch4_window7_224",
    "model_kwargs": None,
    "pretrained": False,
    "img_size": None,
    "drop_path": 0.0,
    "plugin": None,
    "modules": None,
    "decoder": "conv",
    "head": "mlp",
    "partition": "balanced",
    "cuts": None,
    "min_depth": 1,
    "split_blocks": False,
    "recompute": None,
    "grad_checkpointing": False,
    "method_kwargs": None,
    "budget": None,
    "data": "digits",
    "val_split": 0.0,
    "hold_on_device": False,
    "crop_pad": None,
    "hflip": None,
    "mixup": 0.0,
    "cutmix": 0.0,
    "smoothing": 0.1,
    "bad_images": 10,
    "epochs": 24,
    "batch_size": 32,
    "micro_batches": 1,
    "opt": "adamw",
    "lr": 0.003,
    "weight_decay": 0.05,
    "sched": "cosine",
    "warmup_epochs": None,
    "min_lr": 1e-06,
    "clip_grad": None,
    "model_ema": False,
    "model_ema_decay": 0.9998,
    "amp": False,
    "amp_dtype": "bfloat16",
    "offload_optimizer": False,
    "compile": False,
    "val_interval": 1,
    "parallel": None,
    "nproc": None,
}
"""The defaults of version 0.1: results that are older than a setting were made with its value here."""

OPTIONS_OF_0_1: dict[str, dict[str, Any]] = {
    "feature-reconstruction": {"weight": 1.0, "normalize": True},
    "infopro": {
        "task": "softmax",
        "lambda_reconstruction": [1.0, 1.0],
        "lambda_task": [1.0, 1.0],
        "published": False,
        "temperature": 0.07,
    },
}
"""Each method's options in version 0.1, which recorded only those that were typed."""

_JUDGED = {"task": [1.0, 1.0], "contrast": 0, "temperature": 0.07}
NEWER_OPTIONS: dict[str, dict[str, Any]] = {
    "feature-reconstruction": {"sample": 1.0, "reconstruction": [1.0, 1.0], **_JUDGED},
    "greedy": _JUDGED,
}
"""Options that a method did not have in version 0.1, and what was done then."""


def settings_as_recorded(settings: dict[str, Any]) -> dict[str, Any]:
    """Recorded flat settings, with those that did not exist yet as they were then."""
    return SETTINGS_OF_0_1 | NEWER | settings


def options_as_recorded(method: str, recorded: dict[str, Any] | None) -> dict[str, Any]:
    """The options of a method with every default filled in, as a run recorded them in its recipe.

    Args:
        method: its name.
        recorded: `Recipe.record()`; None of a run of version 0.1.
    """
    known = recorded["method_kwargs"] if recorded else OPTIONS_OF_0_1.get(method, {})
    return {**NEWER_OPTIONS.get(method, {}), **known}
