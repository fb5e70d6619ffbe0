"""The head that resembles what follows, on every backbone: its structure, its weights, and that it is private."""

import copy
import itertools

import pytest
import timm
import torch
from torch import nn

from backbones import IMAGE, OTHERS, TIMM, cut
from localprop import localize
from localprop.errors import ConfigError
from localprop.features import infer_layout
from localprop.heads.common import Place
from localprop.heads.successor import SuccessorHead, depth_at, picked
from localprop.memory.cost import Costs
from localprop.memory.part import Conditions
from tiny import MODELS, SIZE, batch, build, module_peaks, split, traced_once, units_of

ALL = 100  # blocks: more than there are


def place_in(model, units, position, index=0, count=3):
    shapes = [units.input_size, *(unit.shape for unit in units)]
    layouts = [
        infer_layout((1, *shape), units.input_size, units.prefix_tokens, units.output_format) for shape in shapes
    ]
    return Place(model, units, layouts, position, index, count)


def head_of(model, units, position, outputs=None, **options):
    place = place_in(model, units, position)
    return SuccessorHead(place.layouts[position], outputs, place, **options)


@pytest.mark.parametrize("name", [*TIMM, *OTHERS])
def test_a_head_of_all_that_follows_is_the_rest_of_the_backbone(name):
    model, units = cut(name)
    images, position = torch.randn(4, *IMAGE), max(len(units) // 2, 1)
    for training in (True, False):
        model = copy.deepcopy(model).train(training)
        head = head_of(model, units, position, depth=ALL, copy=True).train(training)
        features, context = images, {}
        with torch.no_grad():
            for unit in units[:position]:
                features = unit(model, features, context)
            torch.manual_seed(1)
            found = head(features)
            torch.manual_seed(1)
            for unit in [unit for unit in units[position:] if unit.name in head.extra_repr().split(", ")]:
                features = unit(model, features, context)
        assert torch.equal(found, features)
    # All with weights are there, whatever was left out: dropout, say.
    own = {name for unit in units[position:] for name in unit.parameters}
    assert {name.removeprefix("net.") for name, _ in head.named_parameters()} == own


@pytest.mark.parametrize("name", [*TIMM, *OTHERS])
def test_every_backbone_has_such_heads_behind_every_unit(name):
    model, units = cut(name)
    for position in {1, len(units) // 2, len(units) - 1}:
        head = head_of(model, units, position, copy=True)
        assert head.extra_repr().split(", ")[-1] == units[-1].name
        assert not {id(p) for p in head.parameters()} & {id(p) for p in model.parameters()}
        assert all(p.requires_grad for p in head.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_heads_are_private(name):
    net = split(name, method="greedy", head="successor", head_kwargs={"copy": True})
    before = {key: value.clone() for key, value in net.backbone.state_dict().items()}
    for module in net.local_modules[:-1]:
        head = module.local_loss.head
        addresses = {p.data_ptr() for p in net.backbone.parameters()}
        assert not addresses & {p.data_ptr() for p in head.parameters()}
        own = [key for key, _ in module.named_parameters() if key.startswith("auxiliary.")]
        assert own == [f"auxiliary.head.{key}" for key, _ in head.named_parameters()]
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.add_(1)
    assert all(torch.equal(net.backbone.state_dict()[key], value) for key, value in before.items())
    assert {key for key in net.state_dict() if key.startswith("backbone.")} == {f"backbone.{key}" for key in before}


def test_hooks_of_the_backbone_do_not_run_in_heads():
    model, calls = build("vit"), []
    model.blocks[3].register_forward_hook(lambda *_: calls.append(1))
    net = localize(model, 2, "greedy", head="successor", cuts=["blocks.1"], input_size=SIZE)
    net.backward(*batch())
    assert len(calls) == 1


@pytest.mark.parametrize(("blocks", "depth"), list(itertools.product([1, 2, 3, 6, 11, 12], [1, 2, 3, 5, 9, 20])))
def test_blocks_are_picked_evenly_up_to_the_last(blocks, depth):
    found = sorted(picked(blocks, depth))
    d = min(depth, blocks)
    assert len(found) == d
    assert found[-1] == blocks - 1
    # AugLocal: block l + (n - l - 1) / d i, rounded; n - l - 1 blocks follow block l.
    assert all(abs(block + 1 - blocks / d * i) <= 0.5 for i, block in enumerate(found, 1))


def test_depth_falls_towards_the_end():
    assert [depth_at(9, 0.5, i, 11) for i in range(10)] == [9, 9, 8, 8, 7, 7, 6, 6, 5, 5]
    assert [depth_at(3, 1.0, i, 4) for i in range(3)] == [3, 2, 1]
    assert [depth_at(3, 0.0, i, 4) for i in range(3)] == [3, 3, 3]
    assert depth_at(4, 0.5, 0, 2) == 4
    for depth, tau, count in itertools.product([1, 2, 5], [0, 0.3, 1], [3, 6, 16]):
        for i in range(count - 1):
            exact = depth * (1 - i * tau / (count - 2)) + i * tau / (count - 2)
            assert abs(depth_at(depth, tau, i, count) - exact) <= 0.5


def test_the_units_between_that_change_the_shape_come_along():
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        patch_size=2,
        window_size=2,
        embed_dim=12,
        depths=(2, 2, 6, 2),
        num_heads=(1, 1, 2, 2),
        num_classes=5,
    )
    net = localize(model, 4, "auglocal", partition="stage", input_size=SIZE)
    names = [module.local_loss.head.extra_repr() for module in net.local_modules[:-1]]
    down = [f"layers.{i}.downsample" for i in range(4)]
    assert names == [
        f"{down[1]}, {down[2]}, layers.2.blocks.2, {down[3]}, layers.3.blocks.1, head",
        f"{down[2]}, layers.2.blocks.3, {down[3]}, layers.3.blocks.1, head",
        f"{down[3]}, layers.3.blocks.0, layers.3.blocks.1, head",
    ]


@pytest.mark.parametrize("name", ["swin", "vit", "resnet"])
def test_new_weights_are_others_on_the_same_scale(name):
    torch.manual_seed(3)
    model, units = build(name), units_of(name)
    head = head_of(model, units, 2, depth=ALL)
    for key, parameter in head.named_parameters():
        own = model.get_parameter(key.removeprefix("net."))
        if (own == own.flatten()[0]).all():
            assert torch.equal(parameter, own), key
            continue
        assert not torch.equal(parameter, own)
        if own.numel() > 100:
            assert parameter.std().item() == pytest.approx(own.std().item(), rel=0.2), key
            assert abs(torch.corrcoef(torch.stack([parameter.flatten(), own.flatten()]))[0, 1]) < 0.4, key
    norms = [module for module in head.modules() if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d))]
    assert norms
    # timm's ResNets begin with 0 in the last norm of each block.
    assert {value for norm in norms for value in norm.weight.tolist()} == ({0, 1} if name == "resnet" else {1})
    assert not any(norm.bias.any() for norm in norms)
    features = torch.randn(8, *units[1].shape)
    own = head_of(model, units, 2, depth=ALL, copy=True)
    assert 1 / 3 < head(features).std() / own(features).std() < 3
    other = head_of(model, units, 2, depth=ALL)
    assert any(not torch.equal(a, b) for a, b in zip(head.parameters(), other.parameters(), strict=True))


def trained(model):
    """The model after a training step: its norms have moved."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.train()(batch(8)[0]).square().mean().backward()
    optimizer.step()
    return model


@pytest.mark.parametrize("name", ["swin", "resnet"])
def test_weights_of_a_trained_backbone_are_copied(name):
    model, units = trained(build(name)), units_of(name)
    head = head_of(model, units, 2, depth=ALL)
    assert all(torch.equal(p, model.get_parameter(k.removeprefix("net."))) for k, p in head.named_parameters())
    assert all(torch.equal(b, model.get_buffer(k.removeprefix("net."))) for k, b in head.net.named_buffers())
    anew = head_of(model, units, 2, depth=ALL, copy=False)
    for module in anew.modules():
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
        if isinstance(module, nn.BatchNorm2d):
            assert (module.running_mean == 0).all()
    assert not torch.equal(next(anew.parameters()), next(head.parameters()))


def test_other_outputs_come_from_norm_pool_and_a_linear_layer():
    net = split("swin", 2, "greedy", head="successor", method_kwargs={"contrast": 1})
    head = net.local_modules[0].local_loss.head
    assert head.extra_repr() == "layers.1.downsample, layers.1.blocks.0"
    assert head(torch.randn(3, *net.local_modules[0].output_shape)).shape == (3, 128)
    net.backward(*batch())
    assert all(p.grad is not None for p in head.parameters())


def test_frozen_blocks_have_trained_copies():
    model = build("vit")
    model.blocks[3].requires_grad_(False)
    net = localize(model, 2, "greedy", head="successor", cuts=["blocks.1"], input_size=SIZE)
    assert all(p.requires_grad for p in net.local_modules[0].local_loss.head.parameters())


def test_what_the_backbone_exempts_from_weight_decay_is_exempt_in_heads():
    net = split("swin", 2, "greedy", head="successor")
    exempt = net.local_modules[0].no_weight_decay()
    name = "layers.1.blocks.0.attn.relative_position_bias_table"
    assert {name, f"auxiliary.head.net.{name}"} <= exempt
    assert "auxiliary.head.net.layers.1.blocks.0.attn.qkv.weight" not in exempt


class Counting(nn.Module):
    """A model whose second block looks at what the first has seen of the batch."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two, self.head = nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        brightest = x.detach().amax().view(1, 1)
        x = self.one(self.stem(x.flatten(1)[:, :16]))
        return self.head(self.two(x * brightest))


def test_a_backbone_whose_blocks_look_at_other_images_is_one_line():
    with pytest.raises(ConfigError, match=r"differs from batch to batch.*choose another head") as error:
        localize(Counting(), 3, "greedy", head="successor", cuts=["stem", "one"], input_size=SIZE)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"depth": 0}, "depth is 0; it must be at least 1"),
        ({"depth": 1.5}, "depth is 1.5; it is a whole number"),
        ({"tau": 1.5}, "tau is 1.5; it must be between 0 and 1"),
        ({"tau": -0.5}, "tau is -0.5; it must be between 0 and 1"),
        ({"copy": "yes"}, "copy is 'yes'; it is True or False"),
        ({"dept": 2}, "head successor has no option 'dept'; did you mean 'depth'"),
    ],
)
def test_impossible_options_are_one_line(options, said):
    with pytest.raises(ConfigError, match=said) as error:
        split("vit", 2, "greedy", head="successor", head_kwargs=options)
    assert "\n" not in str(error.value)


def test_balance_knows_that_a_heads_cost_depends_on_its_place():
    """The units of a ViT have outputs of one shape, and its heads do not cost the same."""
    options = {"head": "successor", "head_kwargs": {"depth": ALL, "tau": 0}, "input_size": SIZE}
    with traced_once("vit"):
        chosen = localize(build("vit"), 2, "greedy", batch_size=32, **options)
        peaks = {}
        for name in [unit.name for unit in units_of("vit")[1:-1]]:
            net = localize(build("vit"), 2, "greedy", cuts=[name], **options)
            peaks[name] = max(module_peaks(net.train(), *batch(32)))
    assert peaks[chosen.local_modules[0].units[-1]] == min(peaks.values())
    assert chosen.local_modules[0].units[-1] != localize_plain().local_modules[0].units[-1]


def localize_plain():
    with traced_once("vit"):
        return localize(build("vit"), 2, "greedy", batch_size=32, input_size=SIZE)


def test_costs_are_told_apart_by_place():
    model, units = build("vit"), units_of("vit")
    costs, conditions = Costs(model, units), Conditions(8)
    found = set()
    for name in ("blocks.0", "blocks.1", "blocks.2"):
        with traced_once("vit"):
            net = localize(
                model, 2, "greedy", head="successor", head_kwargs={"depth": ALL}, cuts=[name], input_size=SIZE
            )
        target = net.task.target((5,))
        shape = net.local_modules[0].output_shape
        found.add(costs.auxiliary(net.local_modules[0].local_loss, shape, SIZE, target, conditions).kept)
    assert len(found) == 3


def test_values_of_earlier_units_move_with_the_head():
    model, units = cut("vit_small_patch16_dinov3")
    head = head_of(model, units, 2, copy=True)
    kept = [buffer for name, buffer in head.named_buffers() if name.startswith("handed_")]
    assert kept
    assert not any(name.startswith("handed_") for name in head.state_dict())
    assert all(buffer.dtype == torch.bfloat16 for name, buffer in head.bfloat16().named_buffers() if "handed_" in name)


@pytest.mark.parametrize("reach", [0, 1])
@pytest.mark.parametrize("name", ["swin", "vit", "resnet"])
def test_heads_of_all_that_follows_predict_what_the_network_does(name, reach):
    """So a head that reads ahead continues where it reads, and not where its module ends."""
    options = {"depth": ALL, "tau": 0, "copy": True}
    net = split(name, 3, "greedy", head="successor", head_kwargs=options, reach=reach)
    with torch.no_grad():
        predictions = net.eval().module_predictions(batch()[0])
    assert all(torch.equal(prediction, predictions[-1]) for prediction in predictions)
    net.train().backward(*batch(), seed=0)
    assert all(p.grad is not None for module in net.local_modules for p in module.parameters())


def test_weight_decay_is_the_same_for_heads_that_read_ahead():
    own, ahead = (split("swin", 3, "greedy", head="successor", reach=reach).local_modules for reach in (0, 1))
    tables = {
        f"before.{name.removeprefix('auxiliary.')}"
        for name, _ in own[1].named_parameters()
        if name.startswith("auxiliary.") and name.endswith("relative_position_bias_table")
    }
    trained = {name for name, _ in ahead[1].named_parameters()}
    assert tables & trained
    assert tables & trained <= ahead[1].no_weight_decay()
