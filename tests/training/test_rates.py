"""Learning rates of parts of a network: of the backbone, of its layers, and of what is new."""

import copy
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from timm.optim import param_groups_layer_decay
from torch.nn import functional as F

from localprop import localize
from localprop.bench.suite import load_suite
from localprop.cli import main
from localprop.models.backbone import create_backbone
from localprop.settings.config import ModelConfig, OptimConfig, TrainConfig
from localprop.settings.flat import to_flags
from localprop.settings.rates import with_usual_rates
from localprop.training.optimizers import create_optimizer, lr_scales
from localprop.training.state import TrainingState
from tiny import SIZE, assert_same, batch, build, split, traced_once

CPU = torch.device("cpu")


def factors(groups):
    return {id(p): group.get("lr_scale", 1.0) for group in groups for p in group["params"]}


@pytest.mark.parametrize("modules", [2, 3])
@pytest.mark.parametrize("name", ["vit", "swin", "resnet"])
def test_the_factors_of_layers_are_timms(name, modules):
    net = split(name, modules, "greedy")
    config = OptimConfig(layer_decay=0.7)
    expected = factors(param_groups_layer_decay(net.backbone, layer_decay=0.7))
    assert len(set(expected.values())) > 3
    scales = lr_scales(net, config)
    for module in net.local_modules:
        found = factors(create_optimizer(module, config, scales).param_groups)
        assert found.keys() == {id(parameter) for parameter in module.parameters()}
        for key, parameter in module.named_parameters():
            assert found[id(parameter)] == pytest.approx(expected.get(id(parameter), 1.0)), key
            assert (id(parameter) in expected) != key.startswith("auxiliary")


def test_what_is_not_the_backbones_learns_at_the_rate_itself():
    net = split("vit", 3, "feature-reconstruction")
    config = OptimConfig(backbone_lr_scale=0.1, layer_decay=0.5)
    scales = lr_scales(net, config)
    for module in net.local_modules:
        found = factors(create_optimizer(module, config, scales).param_groups)
        for key, parameter in module.named_parameters():
            new = key.startswith(("auxiliary", "before", "head."))
            assert (found[id(parameter)] == 1) == new, key
            assert new or found[id(parameter)] <= 0.1
    assert lr_scales(net, OptimConfig()) == {}


def test_layers_of_ones_own_model_are_its_units():
    net = split("mlp", 3, "greedy")
    scales = lr_scales(net, OptimConfig(backbone_lr_scale=0.1, layer_decay=0.5))
    found = {name: scales[parameter] for name, parameter in net.backbone.named_parameters()}
    expected = {"1": 0.1 / 8, "4": 0.1 / 4, "7": 0.1 / 2, "9": 1.0}
    assert found == {f"{unit}.{leaf}": value for unit, value in expected.items() for leaf in ("weight", "bias")}


@pytest.mark.parametrize("sched", ["cosine", "constant", "none"])
@pytest.mark.parametrize("opt", ["adamw", "momentum"])
def test_a_step_is_that_of_a_plain_optimizer_with_these_rates(opt, sched):
    with traced_once("mlp"):
        net = localize(build("mlp"), method="end-to-end", input_size=SIZE).train()
    model = copy.deepcopy(net.backbone)
    config = OptimConfig(opt=opt, lr=0.1, weight_decay=0.0, warmup_epochs=0, sched=sched, backbone_lr_scale=0.5)
    state = TrainingState(net, config, 10, CPU)
    state.train_step(list(batch()), seed=3)
    net.seed_phase(net.phases[0], 3)
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    kind = {"adamw": torch.optim.AdamW, "momentum": torch.optim.SGD}[opt]
    own = {"fused": True, "weight_decay": 0.0, **({"momentum": 0.9} if opt == "momentum" else {})}
    rates = ((0.1 if name.startswith("9.") else 0.05, parameter) for name, parameter in model.named_parameters())
    kind([{"params": [parameter], "lr": rate} for rate, parameter in rates], lr=0.1, **own).step()
    assert_same(dict(net.backbone.named_parameters()), dict(model.named_parameters()))
    assert state.lr == 0.1


def test_a_resumed_state_has_the_same_rates():
    nets = [split("vit", 3, "greedy").train() for _ in range(2)]
    config = OptimConfig(lr=0.1, backbone_lr_scale=0.1, layer_decay=0.7, epochs=3)
    whole, resumed = (TrainingState(net, config, 2, CPU) for net in nets)
    for step in range(3):
        whole.train_step(list(batch()), seed=step)
        if step == 0:
            resumed.load(copy.deepcopy(whole.parts()), 1)
        else:
            resumed.train_step(list(batch()), seed=step)
    assert_same(*(dict(net.named_parameters()) for net in nets))
    rates = [[group["lr"] for optimizer in s.optimizers for group in optimizer.param_groups] for s in (whole, resumed)]
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 3


TRAINED = TrainConfig(backbone=ModelConfig("resnet18", pretrained=True))


def rates_of(config):
    return config.optim.lr, config.optim.backbone_lr_scale


@pytest.mark.parametrize(
    ("named", "rates"),
    [((), (1e-3, 0.1)), (("lr",), (3e-3, 1.0)), (("backbone_lr_scale",), (1e-3, 1.0)), (("lr", "opt"), (3e-3, 1.0))],
)
def test_trained_weights_have_rates_of_their_own_unless_one_is_named(named, rates):
    assert rates_of(with_usual_rates(TRAINED, named)) == rates
    assert with_usual_rates(TrainConfig(), named) == TrainConfig()


@pytest.mark.parametrize(
    "model", [{"model": "local-dir:x"}, {"model": "hf-hub:x"}, {"initial_checkpoint": "x"}], ids=str
)
def test_wherever_weights_come_from(model):
    assert rates_of(with_usual_rates(TrainConfig(backbone=ModelConfig(**model)), ())) == (1e-3, 0.1)


def test_flags_name_the_rates_of_trained_weights():
    flags = to_flags(TRAINED)
    assert flags[-4:] == ["--lr", "0.003", "--backbone-lr-scale", "1.0"]
    assert "--lr" not in to_flags(TrainConfig())


def test_a_suites_runs_have_them_too(tmp_path):
    (tmp_path / "s.yaml").write_text("settings: {model: resnet18, pretrained: true}\nruns: [{}, {lr: 0.01}]")
    assert [rates_of(run.config) for run in load_suite(str(tmp_path / "s.yaml")).runs] == [(1e-3, 0.1), (0.01, 1.0)]


@pytest.mark.parametrize(
    "flags", [["--backbone-lr-scale", "0"], ["--layer-decay", "1.1"], ["--layer-decay", "0"]], ids=str
)
def test_impossible_factors_get_a_line(flags, capsys):
    assert main(["train", *flags]) == 2
    assert "it must be" in capsys.readouterr().err


def test_a_run_says_how_fast_it_learns(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    kwargs = {"patch_size": 4, "depth": 2, "embed_dim": 24, "num_heads": 2}
    model = create_backbone(ModelConfig("vit_tiny_patch16_224", kwargs, img_size=16), 10).model
    save_file(model.state_dict(), "weights.safetensors")
    flags = ["--model", "vit_tiny_patch16_224", "--model-kwargs", *(f"{key}={value}" for key, value in kwargs.items())]
    flags += ["--initial-checkpoint", "weights.safetensors", "--method", "end-to-end", "--steps", "1", "--epochs", "1"]
    flags += ["--batch-size", "512", "--device", "cpu"]
    for own, words, lr in (
        ([], "learning rate 0.0001; of auxiliary nets and the classifier 0.001", 1e-3),
        (["--lr", "0.003"], "lose what they have learned at a learning rate of 0.003; choose --lr 0.0001, or", 3e-3),
        (["--lr", "0.003", "--freeze", "all"], None, 3e-3),
    ):
        assert main(["train", *flags, *own, "--experiment", str(lr) + str(len(own))]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert words in out if words else "learning rate" not in out
        recorded = yaml.safe_load(Path(f"runs/{lr}{len(own)}/config.yaml").read_text())
        assert (recorded["lr"], recorded["backbone_lr_scale"]) == (lr, 1.0 if own else 0.1)
