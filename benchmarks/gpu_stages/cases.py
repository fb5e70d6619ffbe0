"""What is trained: models with a batch and a precision, and for each the ways to train it."""

from dataclasses import dataclass, field
from typing import Any, Literal

import timm
import torch
from torch import nn

SWIN, VIT = "swin_tiny_patch4_window7_224", "vit_base_patch16_224"
CLASSES = 10
# The ends of all modules but the last, as measured at ba3b577; explicit, so that commits can be compared.
SWIN_2 = ["layers.0.blocks.1"]
SWIN_4 = ["layers.0.blocks.0", "layers.0.blocks.1", "layers.2.blocks.0"]
SWIN_8 = [
    *("layers.0.blocks.0.attn", "layers.0.blocks.0.mlp", "layers.0.blocks.1.attn", "layers.1.blocks.0.attn"),
    *("layers.2.blocks.0.attn", "layers.2.blocks.2.attn", "layers.2.blocks.4.attn"),
]
VIT_2, VIT_4 = ["blocks.5"], ["blocks.2", "blocks.5", "blocks.8"]
VIT_8 = [f"blocks.{k}" for k in (1, 3, 5, 7, 8, 9, 10)]
# For the dry run: the same blocks, so that the same cuts are valid, and very narrow.
TINY = {
    SWIN: {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "num_heads": (1, 1, 1, 1)},
    VIT: {"img_size": 32, "patch_size": 8, "embed_dim": 16, "num_heads": 2},
}


@dataclass(frozen=True)
class Way:
    """One way to train a model.

    Attributes:
        kind: "ordinary": end-to-end, a plain loop. "checkpointing": the same with timm's. "exact": exact training in
            modules. "local": local learning.
        cuts: the last units of all modules but the last, where there are modules.
        options: further arguments of `localprop.localize`.
    """

    kind: Literal["ordinary", "checkpointing", "exact", "local"]
    cuts: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A model, a batch size and a precision, and the ways to train it by name.

    Attributes:
        name: for tables.
        model: timm's name.
        batch: images per step.
        amp: whether it is trained in bfloat16, else in float32.
        ways: the ways; the first is what others are compared with.
        kwargs: for `timm.create_model`.
    """

    name: str
    model: str
    batch: int
    amp: bool
    ways: dict[str, Way]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        side = self.kwargs.get("img_size", 224)
        return 3, side, side

    @property
    def amp_dtype(self) -> torch.dtype | None:
        """The type of mixed precision, if any."""
        return torch.bfloat16 if self.amp else None

    def backbone(self) -> nn.Module:
        """The model, on the CPU, the same at each call."""
        torch.manual_seed(0)
        return timm.create_model(self.model, num_classes=CLASSES, **self.kwargs)


def local(cuts: list[str], recompute: bool = True, **options: Any) -> Way:
    """Local learning by feature reconstruction without reach, unless `options` say otherwise."""
    return Way("local", cuts, {"recompute": recompute, "reach": 0, **options})


def exact(cuts: list[str], blocks: str) -> Way:
    """Exact training, where the units whose names begin so compute cheap results again, as local modules do."""
    return Way("exact", cuts, {"method": "end-to-end", "recompute": False, "recompute_units": {blocks: "cheap"}})


def cases(dry: bool) -> list[Case]:
    """What the stages `large` train, the most important first; in a dry run the same models, very narrow."""
    swin = {
        "end-to-end": Way("ordinary"),
        "K=4": local(SWIN_4),
        "K=4, nothing recomputed": local(SWIN_4, recompute=False),
        "exact K=4": exact(SWIN_4, "layers"),
        "checkpointing": Way("checkpointing"),
        "K=8, blocks split": local(SWIN_8, split_blocks=True),
        "K=2": local(SWIN_2),
        "K=4, a quarter rebuilt": local(SWIN_4, recompute=False, method_kwargs={"sample": 0.25}),
        "K=4, reach 1": local(SWIN_4, recompute=False, reach=1),
        "K=4, greedy": local(SWIN_4, method="greedy"),
        "K=4, decoder conv": local(SWIN_4, decoder="conv"),
    }
    vit = {
        "end-to-end": Way("ordinary"),
        "K=4": local(VIT_4),
        "K=4, nothing recomputed": local(VIT_4, recompute=False),
        "K=4, a quarter rebuilt": local(VIT_4, recompute=False, method_kwargs={"sample": 0.25}),
        "K=4, reach 1": local(VIT_4, recompute=False, reach=1),
        "exact K=4": exact(VIT_4, "blocks"),
        "checkpointing": Way("checkpointing"),
        "K=8": local(VIT_8),
        "K=2": local(VIT_2),
    }
    single = {name: swin[name] for name in ("end-to-end", "K=4")}
    made = [
        ("Swin-Tiny, bf16", SWIN, 128, True, swin),
        ("ViT-B/16, bf16", VIT, 64, True, vit),
        ("Swin-Tiny, fp32", SWIN, 128, False, single),
    ]
    return [
        Case(name, model, 2 if dry else batch, amp, ways, TINY[model] if dry else {})
        for name, model, batch, amp, ways in made
    ]
