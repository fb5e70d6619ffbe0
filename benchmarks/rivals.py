"""Every way to train with less memory, as one training step: exact ones, local ones, and those for fine-tuning."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from measuring import Step, batch_of, local_step, on_device, prime
from torch import nn
from torch.nn import functional as F

import localprop
from localprop.planning.known import known_gaps

SWIN, VIT_S, VIT_B = "swin_tiny_patch4_window7_224", "vit_small_patch16_224", "vit_base_patch16_224"
CONVNEXT = "convnext_tiny"
_STEMS = {SWIN: "patch_embed", CONVNEXT: "stem", VIT_S: "patch_embed", VIT_B: "patch_embed"}
# The half that comes first: most of the memory, in a model of stages. ConvNeXt's and Swin's stages 0 and 1.
_EARLY = {
    SWIN: ["layers.0", "layers.1"],
    CONVNEXT: ["stages.0", "stages.1"],
    VIT_S: [f"blocks.{i}" for i in range(6)],
    VIT_B: [f"blocks.{i}" for i in range(6)],
}
_BLOCKS = {SWIN: "layers", CONVNEXT: "stages", VIT_S: "blocks", VIT_B: "blocks"}
_SLICES = 8
_MICRO = 4


@dataclass(frozen=True)
class Rival:
    """A way to train.

    Attributes:
        name: in the table.
        kind: "exact", "local", "other numbers" or "fine-tuning".
        gradients: whether they are those of end-to-end training in one piece.
        accuracy: what it is known to cost.
        network: the network of a model, for a batch size and a type of mixed precision.
        options: of its step; see `step_of`.
    """

    name: str
    kind: str
    gradients: str
    accuracy: str
    network: Callable[[str, int, bool], nn.Module]
    options: dict[str, Any] = field(default_factory=dict)


def backbone(model: str, *_: Any) -> nn.Module:
    """The model, as timm makes it for 10 classes."""
    torch.manual_seed(0)
    return timm.create_model(model, num_classes=10)


def step_of(net: nn.Module, batch_size: int, device: str, amp: bool, **options: Any) -> Step:
    """A training step, and the tensors that live from step to step."""
    if isinstance(net, localprop.LocalNetwork) and not options:
        return local_step(net, batch_size, device, amp)
    return _ordinary(net, batch_size, device, amp, **options)


def _ordinary(
    net: nn.Module, batch_size: int, device: str, amp: bool, parts: int = 1, in_backward: bool = False, opt: str = ""
) -> Step:
    """A plain step of AdamW, over micro-batches or not; `in_backward` steps a weight as soon as it has a gradient."""
    on_device(net, device).train()
    trained = [p for p in net.parameters() if p.requires_grad]
    if opt:
        import torchao.optim

        torch.compiler.set_stance("force_eager")  # its compiler takes minutes on a CPU
        optimizers = [getattr(torchao.optim, opt)(trained)]
    else:
        optimizers = [
            torch.optim.AdamW(own, fused=True) for own in ([[p] for p in trained] if in_backward else [trained])
        ]
    state, dtype = prime(optimizers), trained[0].dtype
    if in_backward:
        for parameter, optimizer in zip(trained, optimizers, strict=True):

            def done(own: torch.Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
                optimizer.step()
                own.grad = None

            parameter.register_post_accumulate_grad_hook(done)

    def step() -> None:
        images, labels = batch_of(batch_size, device)
        for part, own in zip(images.to(dtype).chunk(parts), labels.chunk(parts), strict=True):
            with torch.autocast(device, torch.bfloat16, enabled=amp):
                loss = F.cross_entropy(net(part).float(), own) / parts
            loss.backward()
            del loss
        if not in_backward:
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    return step, [*net.parameters(), *net.buffers(), *state]


def _timms(model: str, *_: Any) -> nn.Module:
    net = backbone(model)
    net.set_grad_checkpointing()
    return net


def _lora(model: str, *_: Any) -> nn.Module:
    return localprop.add_lora(backbone(model), 8)


def _frozen(model: str, *_: Any) -> nn.Module:
    net = backbone(model)
    for name in (_STEMS[model], *_EARLY[model]):
        net.get_submodule(name).requires_grad_(False)
    return net


def _network(
    modules: int,
    method: str,
    again: Callable[[str], dict[str, str]] | None = None,
    of: Callable[[str], nn.Module] = backbone,
    **options: Any,
) -> Any:
    def build(model: str, batch_size: int, amp: bool) -> nn.Module:
        dtype = torch.bfloat16 if amp else None
        own = options | ({"recompute_units": again(model)} if again else {})
        return localprop.localize(of(model), modules, method, batch_size=batch_size, amp_dtype=dtype, **own)

    return build


def _early(value: str) -> Callable[[str], dict[str, str]]:
    return lambda model: dict.fromkeys((_STEMS[model], *_EARLY[model]), value)


def _all(value: str) -> Callable[[str], dict[str, str]]:
    return lambda model: dict.fromkeys((_STEMS[model], _BLOCKS[model]), value)


def _cost(modules: int, reach: int = 0) -> str:
    """The gaps to end-to-end training that are known, in points."""
    asked = ("feature-reconstruction", modules, reach, False, 0.0, False)
    gaps = [
        gap
        for known in known_gaps()
        if (known.method, known.modules, known.reach, known.kinetic, known.finish, known.trained) == asked
        for gap in known.gaps
    ]
    if not gaps:
        return "not measured"
    return " to ".join(dict.fromkeys(f"{end:+.1f}" for end in (max(gaps), min(gaps)))) + " points"


def rivals() -> list[Rival]:
    """All of them, end-to-end training first."""
    slices = f"whole/{_SLICES}"
    in_backward = {"in_backward": True}
    end_to_end = "end-to-end"
    branches = _network(1, end_to_end, split_blocks=True, grad_checkpointing=True)
    result = [
        Rival(end_to_end, "exact", "yes", "none", backbone),
        Rival("each block checkpointed (timm's)", "exact", "yes", "none", _timms),
        Rival("each branch checkpointed", "exact", "yes", "none", branches),
        Rival("first half checkpointed", "exact", "yes", "none", _network(1, end_to_end, _early("whole"))),
        Rival("optimizer's step in backward", "exact", "yes", "none", backbone, in_backward),
        Rival("each branch, step in backward", "exact", "yes", "none", branches, in_backward),
        Rival(f"{_MICRO} micro-batches", "exact", "up to rounding", "none", backbone, {"parts": _MICRO}),
        Rival(
            f"{_MICRO} micro-batches, each block checkpointed",
            "exact",
            "up to rounding",
            "none",
            _timms,
            {"parts": _MICRO},
        ),
        Rival(f"all in {_SLICES} slices", "exact", "up to rounding", "none", _network(1, end_to_end, _all(slices))),
        *(Rival(f"exact K={k}", "exact", "yes", "none", _network(k, end_to_end)) for k in (2, 4)),
        Rival("8-bit AdamW", "other numbers", "yes", "not measured", backbone, {"opt": "AdamW8bit"}),
        Rival("weights in bf16", "other numbers", "no", "not measured", lambda *own: backbone(*own).bfloat16()),
    ]
    method = "feature-reconstruction"
    for reach in (0, 1):
        for k in (2, 4):
            name = f"local K={k}" + (f", reach {reach}" if reach else "")
            result.append(Rival(name, "local", "no", _cost(k, reach), _network(k, method, reach=reach)))
        name = "local K=8, split" + (f", reach {reach}" if reach else "")
        result.append(Rival(name, "local", "no", _cost(8, reach), _network(8, method, reach=reach, split_blocks=True)))
    sliced = _network(8, method, _early(slices), split_blocks=True, reach=0)
    return [
        *result,
        Rival(f"local K=8, split, first half in {_SLICES} slices", "local", "no", _cost(8), sliced),
        Rival("LoRA, rank 8", "fine-tuning", "no", "not measured", _lora),
        Rival("LoRA, rank 8, exact K=4", "fine-tuning", "no", "not measured", _network(4, end_to_end, of=_lora)),
        Rival("LoRA, rank 8, local K=4", "fine-tuning", "no", "not measured", _network(4, method, of=_lora, reach=0)),
        Rival("first half frozen", "fine-tuning", "no", "not measured", _frozen),
    ]
