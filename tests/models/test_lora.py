"""LoRA adapters: what gets them, what is trained beside them, and what is left of them in an export."""

import copy
import sys

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from adapters import WHY, adapted, chain_of
from adapters import adapted_network as network
from localprop import add_lora, localize, merge_lora
from localprop.division.exactly import exactly
from localprop.errors import ChainError, ConfigError, NonFiniteWeightError
from localprop.models.lora import merged_weights
from localprop.settings.config import OptimConfig
from localprop.training.state import TrainingState
from one_graph import one_graph
from tiny import CUTS, MODELS, SIZE, assert_same, batch, build, gradients, units_of

peft = pytest.importorskip("peft", reason=WHY)

CPU = torch.device("cpu")
HEADS = {"swin": "head.fc", "vit": "head", "resnet": "fc", "mlp": "9", "cnn": "12"}


def layers_of(model):
    return [name for name, module in model.named_modules() if hasattr(module, "base_layer")]


LAYERS = {
    "swin": ["qkv", "proj", "fc1", "fc2"],
    "vit": ["qkv", "proj", "fc1", "fc2"],
    "resnet": ["conv1", "conv2", "0"],
    "mlp": ["1", "4", "7"],
    "cnn": ["0", "3", "7"],
}


@pytest.mark.parametrize("name", MODELS)
def test_linear_layers_and_convolutions_of_blocks_are_adapted_and_all_but_the_classifier_is_frozen(name):
    plain = build(name).eval()
    model = add_lora(build(name).eval(), 2, input_size=SIZE)
    assert torch.equal(model(batch()[0]), plain(batch()[0]))
    ends = list(dict.fromkeys(layer.rpartition(".")[2] for layer in layers_of(model)))
    assert ends == LAYERS[name] + (["reduction"] if name == "swin" else [])
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    pairs = {f"{layer}.lora_{half}.default.weight" for layer in layers_of(model) for half in "AB"}
    assert trained == pairs | {f"{HEADS[name]}.weight", f"{HEADS[name]}.bias"}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_adapters_has_the_units_of_the_plain_one(name):
    assert [(unit.name, unit.shape, unit.depth) for unit in chain_of(name)] == [
        (unit.name, unit.shape, unit.depth) for unit in units_of(name)
    ]


@pytest.mark.parametrize("name", MODELS)
def test_merged_it_is_the_plain_model_again_with_the_same_logits(name):
    model = adapted(name).eval()
    images, before = batch()[0], {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(images)
    weights = merged_weights(model, model.state_dict())
    assert_same(dict(model.state_dict()), before)  # nothing has been changed
    plain = build(name).eval()
    assert weights.keys() == plain.state_dict().keys()
    assert not torch.allclose(plain(images), expected, atol=1e-3)
    plain.load_state_dict(weights)
    torch.testing.assert_close(plain(images), expected, rtol=1e-5, atol=1e-5)
    merge_lora(model)
    assert_same(dict(model.state_dict()), weights)
    assert not layers_of(model)
    assert not hasattr(model, "peft_config")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_targets_are_ends_of_names_parts_and_patterns():
    def ends(*targets):
        return layers_of(adapted("vit", targets=targets))

    assert ends("qkv") == [f"blocks.{i}.attn.qkv" for i in range(4)]
    assert ends("blocks.3") == [f"blocks.3.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert ends("blocks.[23].attn", "blocks.0.mlp.fc?") == [
        *("blocks.0.mlp.fc1", "blocks.0.mlp.fc2"),
        *(f"blocks.{i}.attn.{name}" for i in (2, 3) for name in ("qkv", "proj")),
    ]
    assert ends("patch_embed") == ["patch_embed.proj"]


@pytest.mark.parametrize(
    ("name", "targets", "words"),
    [
        ("vit", ["qkw"], "no layer is called 'qkw'; did you mean 'qkv'?"),
        ("vit", ["qkv", "head"], "head can have no LoRA adapter: the classifier is trained as a whole"),
        ("grouped", ["0"], "0 can have no LoRA adapter: that takes a linear layer, or a convolution of one group"),
        ("grouped", None, "Sequential has no layer for LoRA: that takes a linear layer"),
    ],
)
def test_targets_that_cannot_be_had_get_a_line(name, targets, words):
    grouped = nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    with pytest.raises(ConfigError) as caught:
        add_lora(grouped if name == "grouped" else build(name), 2, targets=targets, input_size=SIZE)
    assert words in str(caught.value)


class Passing(nn.Module):
    """Uses the weight of one layer without calling it, and another layer twice."""

    def __init__(self):
        super().__init__()
        self.weight_only, self.twice, self.again, self.plain = (nn.Linear(8, 8) for _ in range(4))
        self.again.weight = self.twice.weight
        self.alias, self.head = self.twice, nn.Linear(8, 8)

    def forward(self, x):
        x = F.linear(x.mean(3).flatten(1)[:, :8], self.weight_only.weight)
        return self.head(self.alias(self.again(self.twice(self.plain(x)))))


def test_layers_that_are_not_called_or_are_shared_get_none():
    """An adapter there would do nothing, or be merged into what another layer uses."""
    assert layers_of(add_lora(Passing(), 2, input_size=SIZE)) == ["plain"]
    v2 = timm.create_model("swinv2_tiny_window8_256", img_size=32, patch_size=2, window_size=4, embed_dim=24,
                           depths=(1, 1), num_heads=(1, 2), num_classes=5)  # fmt: skip
    assert not [name for name in layers_of(add_lora(v2, 2, input_size=SIZE)) if name.endswith("qkv")]


def test_it_is_one_line_what_cannot_be_done():
    with pytest.raises(ConfigError, match=r"the model has adapters already; merge them first"):
        add_lora(adapted("mlp"), 2, input_size=SIZE)
    with pytest.raises(ConfigError, match="the rank of LoRA is 0; it must be a whole number, at least 1"):
        add_lora(build("mlp"), 0, input_size=SIZE)
    broken = nn.Sequential(nn.Flatten(), nn.Linear(7, 5), nn.Linear(5, 5))
    with pytest.raises(ChainError, match="cannot add adapters to Sequential: its forward fails"):
        add_lora(broken, 2, input_size=SIZE)
    model = adapted("mlp")
    model.get_parameter("1.lora_B.default.weight").data[0, 0] = float("nan")
    with pytest.raises(NonFiniteWeightError, match="the adapter of 1 cannot be merged"):
        merge_lora(model)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_one_module_is_a_plain_loop_of_peft(name):
    """With batch norm in evaluation mode, which keeps the statistics of what is frozen."""
    net = network(name, method="end-to-end")
    model = adapted(name).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    optimizers = [torch.optim.AdamW([p for p in own.parameters() if p.requires_grad]) for own in (net, model)]
    for step in range(3):
        images, labels = batch(seed=step)
        torch.manual_seed(step)
        net.backward(images, labels)
        torch.manual_seed(step)
        F.cross_entropy(model(images), labels).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_same(dict(net.backbone.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_exact_training_with_adapters_is_one_graph(name):
    nets = [network(name, method="end-to-end", cuts=CUTS[name][3]) for _ in range(2)]
    images, labels = batch()
    nets[0].backward(images, labels, seed=5)
    one_graph(nets[1], images, labels, 5)
    assert_same(gradients(nets[0]), gradients(nets[1]))
    trained = {f"backbone.{key}" for key, own in nets[0].backbone.named_parameters() if own.requires_grad}
    assert gradients(nets[0]).keys() == trained
    assert_same(dict(nets[0].named_buffers()), dict(nets[1].named_buffers()))


METHODS = ["feature-reconstruction", "greedy", "infopro", "trgl", "auglocal", "lopt", "distance", "end-to-end"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_every_method_trains_adapters_and_nothing_else_of_the_backbone(name, method):
    net = network(name, method=method, cuts=CUTS[name][3])
    state = TrainingState(net, OptimConfig(lr=0.1, warmup_epochs=0), 10, CPU)
    before = {key: value.clone() for key, value in net.backbone.state_dict().items()}
    for step in range(2):
        state.train_step(list(batch()), seed=step)
    changed = {key for key, value in net.backbone.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key, parameter in net.backbone.named_parameters() if parameter.requires_grad}
    stepped = {id(parameter) for optimizer in state.optimizers for parameter in optimizer.state}
    assert stepped == {id(parameter) for parameter in net.parameters() if parameter.requires_grad}


@pytest.mark.parametrize("method", ["distance", "auglocal"])
def test_auxiliary_nets_that_copy_units_copy_them_without_adapters(method):
    net = network("vit", method=method, cuts=CUTS["vit"][2])
    copies = dict(net.local_modules[0].local_loss.named_parameters())
    assert any(name.endswith("attn.qkv.weight") for name in copies)
    assert not any("lora" in name or "base_layer" in name for name in copies)
    if method == "distance":
        own = "blocks.1.mlp.fc1"
        assert torch.equal(copies[f"copy.net.{own}.weight"], net.backbone.get_parameter(f"{own}.base_layer.weight"))


def test_what_is_frozen_keeps_its_adapters_and_units_without_adapters_are_frozen():
    net = network("vit", method="greedy", cuts=["patch_embed", "blocks.1"], freeze=["blocks.[01]"], min_depth=0)
    net.backward(*batch())
    assert not any([*module.local_loss.parameters()] for module in net.local_modules)
    assert all(key.startswith(("backbone.blocks.2", "backbone.blocks.3", "backbone.head")) for key in gradients(net))
    for freeze in (["all"], ["blocks"]):
        with pytest.raises(ChainError, match="every unit that has adapters is frozen: freeze less"):
            network("vit", method="greedy", cuts=["blocks.1"], freeze=freeze)


def test_a_stem_without_adapters_only_runs_and_batch_norm_keeps_its_statistics():
    net = network("resnet", method="greedy", cuts=["conv1", "layer2"], min_depth=0)
    assert [[*module.local_loss.parameters()] != [] for module in net.local_modules] == [False, True, False]
    norms = [module for module in net.backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert not any(module.training for module in norms)
    assert not any(module.training for module in exactly(net).train().backbone.modules() if module in norms)


def test_adapters_make_no_copies_in_float32_under_autocast():
    model = adapted("vit", targets=["mlp.fc1"])
    kinds = []
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_pre_hook(lambda module, inputs: kinds.append(inputs[0].dtype))
    for block in model.blocks:
        block.norm2.register_forward_hook(lambda module, inputs, output: output.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        model(batch()[0])
    assert kinds == [torch.bfloat16] * 4


def test_a_part_of_a_checkpoint_has_adapters_and_comes_back():
    nets = [network("vit", method="greedy", cuts=["blocks.1"]) for _ in range(2)]
    states = [TrainingState(net, OptimConfig(lr=0.1, model_ema=True), 10, CPU) for net in nets]
    states[0].train_step(list(batch()), seed=0)
    states[1].load(copy.deepcopy(states[0].parts()), 1)
    for state in states:
        state.train_step(list(batch(seed=1)), seed=1)
    assert_same(dict(nets[0].state_dict()), dict(nets[1].state_dict()))
    assert_same(dict(states[0].ema.module.state_dict()), dict(states[1].ema.module.state_dict()))


@pytest.mark.parametrize("wrapped", [False, True])
def test_adapters_of_ones_own_are_trained_too(wrapped):
    """Those of peft itself, with other settings."""
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["qkv"], use_rslora=True)
    if wrapped:
        config.modules_to_save = ["head"]
        model = peft.get_peft_model(build("vit"), config)
    else:
        model = peft.inject_adapter_in_model(config, build("vit"))
        model.head.requires_grad_(True)
    net = localize(model, 2, "greedy", input_size=SIZE).train()
    net.backward(*batch())
    trained = {f"backbone.{key}" for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 10
    assert trained == {key for key in gradients(net) if key.startswith("backbone.")}
    if not wrapped:
        images = batch()[0]
        expected = net.eval()(images)
        torch.testing.assert_close(merge_lora(model)(images), expected, rtol=1e-5, atol=1e-5)


def test_without_peft_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"LoRA needs peft \(.*\); pip install 'localprop\[lora\]'"):
        add_lora(build("mlp"), 2, input_size=SIZE)


def test_a_version_that_does_not_fit_gets_a_line(monkeypatch):
    def refuse(*_):
        raise ImportError("cannot import name 'x' from 'torchao'")

    monkeypatch.setattr(peft, "inject_adapter_in_model", refuse)
    with pytest.raises(ConfigError, match=r"peft cannot be used \(cannot import name 'x' .*; pip install -U"):
        add_lora(build("mlp"), 2, input_size=SIZE)
