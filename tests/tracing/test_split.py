"""Chains that cut inside blocks: still the model bit for bit, and never more apart than its forward allows."""

import functools

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from backbones import IMAGE, OTHERS, RATES, TIMM, assert_equal, built, cut, through_units, trained
from localprop.tracing.chains import chain

# name: units with split blocks, where there are more than without
SPLIT = {
    "swin_tiny_patch4_window7_224": 15,
    "swinv2_tiny_window8_256": 15,
    "vit_tiny_patch16_224": 8,
    "deit3_small_patch16_224": 8,
    "eva02_tiny_patch14_224": 8,
    "vit_small_patch14_dinov2": 8,
    "vit_small_patch16_dinov3": 8,
    "beit_base_patch16_224": 8,
    "naflexvit_base_patch16_gap": 8,
    "cait_xxs24_224": 9,
    "xcit_nano_12_p16_224": 18,
    "mvitv2_tiny": 22,
    "pvt_v2_b0": 15,
    "davit_tiny": 45,
    "hiera_tiny_224": 12,
    "volo_d1_224": 41,
    "nest_tiny": 28,
    "maxvit_nano_rw_256": 17,
    "coatnet_nano_rw_224": 11,
    "mixer_s16_224": 18,
    "efficientnet_b0": 37,
    "torchvision swin_t": 15,
    "torchvision vit_b_16": 8,
}
SIZE = (3, 16, 16)


@functools.cache
def split(name):
    model = built(name)
    return model, chain(model, IMAGE, split_blocks=True)


def isolated(model, units, images):
    """The same pass with a loss and a backward pass per unit; which parameters each of them reaches."""
    reached, context = [], {}
    parameters = dict(model.named_parameters())
    for unit in units:
        output = unit(model, images, context)
        output.square().mean().backward()
        reached.append({name for name, p in parameters.items() if p.grad is not None})
        model.zero_grad()
        images = output.detach()
    return images, reached


@pytest.mark.parametrize("name", SPLIT)
def test_units_are_the_model(name):
    model, units = split(name)
    keys, images = list(model.state_dict()), torch.randn(2, *IMAGE)
    model.train()
    assert_equal(trained(model, model, images), trained(model, lambda x: through_units(model, units, x), images))
    model.eval()
    output, reached = isolated(model, units, images)
    assert torch.equal(model(images), output)
    assert list(model.state_dict()) == keys
    used = [name for unit in units for name in unit.parameters]
    assert len(used) == len(set(used))
    for unit, names in zip(units, reached, strict=True):
        assert names, f"{unit.name} learns nothing"
        assert names <= set(unit.parameters)


@pytest.mark.parametrize("name", [*TIMM, *OTHERS])
def test_units_are_the_blocks_or_parts_of_them(name):
    (_, blocks), (_, units) = cut(name), split(name)
    assert len({unit.name for unit in units}) == len(units) == SPLIT.get(name, len(blocks)), units.names()
    ends = [units.position(block.name) for block in blocks]
    assert ends == sorted(set(ends))
    assert [units[end - 1].shape for end in ends] == [block.shape for block in blocks]
    if name not in SPLIT:
        assert units.names() == blocks.names()


def test_names_and_positions():
    _, units = split("swin_tiny_patch4_window7_224")
    assert [unit.name for unit in units][:4] == [
        "patch_embed",
        "layers.0.blocks.0.attn",
        "layers.0.blocks.0.mlp",
        "layers.1.downsample",
    ]
    assert [unit.shape for unit in units][1:3] == [(16, 16, 96)] * 2  # not flattened, as it is for the MLP
    assert units.position("layers.0.blocks.0.attn") == 2
    assert units.position("layers.0.blocks.0") == units.position("layers.0") == 3
    assert units.position("layers.2") == 11


def test_hooks_run_on_blocks_that_are_not_split():
    model = timm.create_model("coatnet_nano_rw_224", **TIMM["coatnet_nano_rw_224"][1], **RATES)
    calls = []
    for name in ("stages.0.blocks.0", "stages.2.blocks.0", "stages.2.blocks.0.attn"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    through_units(model, chain(model, IMAGE, split_blocks=True), torch.randn(2, *IMAGE))
    assert calls == ["stages.0.blocks.0", "stages.2.blocks.0.attn"]


def test_gradient_checkpointing():
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, **RATES)
    units, images = chain(model, split_blocks=True), torch.randn(2, *IMAGE)
    plain = trained(model, lambda x: through_units(model, units, x), images)
    model.set_grad_checkpointing()
    runs = []
    model.blocks[0].mlp.register_forward_pre_hook(lambda *_: runs.append("mlp"))
    assert_equal(plain, trained(model, lambda x: through_units(model, units, x), images))
    assert runs == ["mlp", "mlp"]


class Block(nn.Module):
    """Two residual steps, from which the tests derive blocks of all kinds."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
        self.b = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
        self.norm = nn.LayerNorm(8)

    def first(self, x):
        return x + F.dropout(self.a(self.norm(x)), 0.3, self.training)

    def forward(self, x):
        x = self.first(x)
        return x + self.b(x)


class Plain(Block):
    def forward(self, x):  # starts with a norm, and nothing is alive beside it
        return self.b(self.a(self.norm(x)))


class ScaledBack(Block):
    def __init__(self):
        super().__init__()
        self.scale = nn.Conv1d(8, 8, 1, groups=8, bias=False)  # a vector, if one of three axes

    def forward(self, x):
        x = self.first(x)
        return x + self.scale(self.b(x).mT).mT


class OneStep(Block):
    def forward(self, x):
        return x + self.b(self.a(x))


class LoopsInTraining(Block):
    def forward(self, x):
        return (
            torch.stack([super(LoopsInTraining, self).forward(i) for i in x]) if self.training else super().forward(x)
        )


class LoopsInEval(Block):
    def forward(self, x):
        return super().forward(x) if self.training else torch.stack([super(LoopsInEval, self).forward(i) for i in x])


class Remembers(Block):
    def __init__(self):
        super().__init__()
        self.mask = None

    def forward(self, x):
        if self.mask is None:
            self.mask = torch.ones(x.shape[1:])
        return super().forward(x * self.mask)


class Counts(Block):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class PositionsFirst(Block):
    def forward(self, x):
        x = self.first(x.transpose(0, 1))
        return (x + self.b(x)).transpose(0, 1)


class PositionsAsImages(Block):
    def forward(self, x):
        y = self.first(x.flatten(0, 1))
        return (y + self.b(y)).unflatten(0, (x.shape[0], x.shape[1]))


class GivesTwo(Block):
    def forward(self, x):  # cannot be told apart from the next block, so not from itself either
        x = self.first(x[0] + x[1] if isinstance(x, tuple) else x)
        return x + self.b(x), x


class Blocks(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.stem = nn.Linear(48, 8)
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(F.pixel_unshuffle(x, 4).flatten(2).mT)
        for block in self.blocks:
            x = block(x)
        return self.fc((x[0] if isinstance(x, tuple) else x).mean(1))


def _torch_block():
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)  # computes otherwise when no gradients are wanted


PARTS = ["stem", "blocks.0.a", "blocks.0.b", "blocks.1.a", "blocks.1.b", "fc"]
WHOLE = ["stem", "blocks.0", "blocks.1", "fc"]


@pytest.mark.parametrize(
    ("block", "names"),
    [
        *((block, PARTS) for block in (Block, Plain, ScaledBack)),
        *((block, WHOLE) for block in (OneStep, LoopsInTraining, LoopsInEval, Remembers, Counts)),
        *((block, WHOLE) for block in (PositionsFirst, PositionsAsImages, _torch_block)),
        (GivesTwo, ["stem", "blocks", "fc"]),
    ],
)
def test_units_of(block, names):
    torch.manual_seed(0)
    model = Blocks(block)
    units = chain(model, SIZE, split_blocks=True)
    assert [unit.name for unit in units] == names
    for unit in units:  # none uses a part of another block, not even its norm
        block = ".".join(unit.name.split(".")[:2])
        assert {name.startswith(f"{block}.") for name in unit.parameters} == {True}
    for batch in (2, 3, 5):
        images = torch.randn(batch, *SIZE)
        model.train()
        assert_equal(trained(model, model, images), trained(model, lambda x: through_units(model, units, x), images))
        model.eval()
        with torch.no_grad():
            assert torch.equal(model(images), through_units(model, units, images))
