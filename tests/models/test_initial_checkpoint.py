"""Weights that training starts from: files and folders in their true formats, through timm's own filters."""

import argparse
import json
import math
import os
import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import localprop
from localprop.cli import main
from localprop.errors import ConfigError, NonFiniteWeightError
from localprop.models.backbone import create_backbone
from localprop.models.sources import with_source
from localprop.report.losses import read_losses
from localprop.settings.config import ModelConfig
from places import SHARED
from tiny import assert_same

NAME = "vit_tiny_patch16_224"
KWARGS = {"patch_size": 4, "depth": 2, "embed_dim": 24, "num_heads": 2}
VIT = ["--model", NAME, "--model-kwargs", *(f"{key}={value}" for key, value in KWARGS.items())]
SHORT = ["--method", "end-to-end", "--epochs", "1", "--batch-size", "512", "--device", "cpu", "--smoothing", "0"]


def vit(classes=7, size=16):
    torch.manual_seed(3)
    return timm.create_model(NAME, img_size=size, num_classes=classes, **KWARGS)


def built(place, classes, config=None):
    config, source = with_source(config or ModelConfig(NAME, KWARGS, img_size=16, initial_checkpoint=str(place)))
    return create_backbone(config, classes, source)


@pytest.fixture
def file(tmp_path):
    save_file(vit().state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def wrapped(weights):
    return {f"module.{name}": value for name, value in weights.items()}


FORMS = {
    "plain.pth": lambda own: own,
    "lite.bin": lambda own: {"model": own},
    "timm.pth.tar": lambda own: {
        "epoch": 3,
        "arch": NAME,
        "state_dict": wrapped(own),
        "args": argparse.Namespace(lr=0.1),
        "optimizer": {"state": {}, "param_groups": []},
    },
    "compiled.pth": lambda own: {"state_dict": {f"_orig_mod.{name}": value for name, value in own.items()}},
    "average.pth.tar": lambda own: {"state_dict": {}, "state_dict_ema": wrapped(own)},
}


@pytest.mark.parametrize("name", [*FORMS, "weights.safetensors"])
def test_a_file_of_every_form_is_loaded(name, file, tmp_path):
    expected = vit().state_dict()
    if name in FORMS:
        torch.save(FORMS[name](dict(expected)), tmp_path / name)
    model, _, (note,) = built(tmp_path / name, 7)
    assert note == f"{tmp_path / name}: loaded {len(expected)} of {len(expected)} tensors"
    assert_same(model.state_dict(), expected)


def test_a_head_for_other_classes_is_new_and_zero(file):
    expected = vit().state_dict()
    model, _, (note,) = built(file, 5)
    assert note == f"{file}: loaded {len(expected) - 2} of {len(expected)} tensors; new: head.weight, head.bias"
    head = {"head.weight": torch.zeros(5, 24), "head.bias": torch.zeros(5)}
    assert_same(model.state_dict(), {**expected, **head})


def test_position_embeddings_are_resized_as_timm_does(file):
    model = built(file, 7, ModelConfig(NAME, KWARGS, img_size=32, initial_checkpoint=str(file))).model
    overlay = {"file": str(file), "num_classes": 7}
    theirs = timm.create_model(
        NAME, img_size=32, num_classes=7, pretrained=True, pretrained_cfg_overlay=overlay, **KWARGS
    )
    assert model.pos_embed.shape != vit().pos_embed.shape
    assert_same(model.state_dict(), theirs.state_dict())


def test_float16_becomes_float32(tmp_path):
    own = vit().state_dict()
    save_file({name: value.half() for name, value in own.items()}, tmp_path / "half.safetensors")
    model = built(tmp_path / "half.safetensors", 7).model
    assert_same(model.state_dict(), {name: value.half().float() for name, value in own.items()})


class Code:
    def __reduce__(self):
        return (os.mkdir, ("ran",))


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": vit().state_dict(), "args": Code()}, "code.pth")
    Path("raw.pth").write_bytes(pickle.dumps(Code()))
    for name in ("code.pth", "raw.pth"):
        with pytest.raises(ConfigError, match=f"{name} is no file of weights"):
            built(name, 7)
    assert not Path("ran").exists()


def refusal(place, config=None):
    with pytest.raises(ConfigError) as caught:
        built(place, 7, config)
    return str(caught.value)


def test_weights_of_another_model_are_refused_with_what_differs(file):
    line = refusal(file, ModelConfig("resnet18", initial_checkpoint=str(file)))
    assert line.startswith(
        f"{file} is not of resnet18: it lacks 100 tensors of 122 (conv1.weight, bn1.weight, bn1.bias "
    )
    deeper = ModelConfig(NAME, {**KWARGS, "depth": 3}, img_size=16, initial_checkpoint=str(file))
    assert "it lacks 12 tensors of 44 (blocks.2.norm1.weight" in refusal(file, deeper)
    shallower = ModelConfig(NAME, {**KWARGS, "depth": 1}, img_size=16, initial_checkpoint=str(file))
    assert "has 12 tensors more (blocks.1." in refusal(file, shallower)
    wider = ModelConfig(NAME, {**KWARGS, "mlp_ratio": 2}, img_size=16, initial_checkpoint=str(file))
    assert "of another shape (blocks.0.mlp.fc1.weight is (96, 24) and not (48, 24)" in refusal(file, wider)


def test_what_cannot_be_loaded_gets_a_line(tmp_path, file):
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(file.read_bytes()[:-100])
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "other.pth")
    os.mkfifo(tmp_path / "pipe.pth")
    assert "no file of weights" in refusal(damaged)
    assert "has no tensors by name, only epoch, lr" in refusal(tmp_path / "other.pth")
    assert "it is no regular file" in refusal(tmp_path / "pipe.pth")
    assert "there is no file or folder" in refusal(tmp_path / "nothing.pth")
    assert "has neither timm's config.json nor a run's run.json" in refusal(tmp_path)
    both = ModelConfig(NAME, pretrained=True, initial_checkpoint=str(file))
    assert "leave out one" in refusal(file, both)
    twice = ModelConfig(f"local-dir:{tmp_path}", initial_checkpoint=str(file))
    assert "leave out --initial-checkpoint" in refusal(file, twice)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    own = vit().state_dict()
    own["blocks.1.mlp.fc1.weight"][3, 3] = math.nan
    save_file(own, tmp_path / "nan.safetensors")
    with pytest.raises(NonFiniteWeightError, match=r"blocks\.1\.mlp\.fc1\.weight is not finite"):
        built(tmp_path / "nan.safetensors", 7)


@pytest.mark.parametrize("argument", ["pretrained_cfg", "pretrained_cfg_overlay"])
def test_weights_that_timm_would_pass_over_are_refused(argument, file):
    kwargs = {**KWARGS, argument: {"file": str(file)}}
    assert f"write --initial-checkpoint {file}" in refusal(file, ModelConfig(NAME, kwargs))
    kwargs = {**KWARGS, argument: {"url": "https://example.org/x.pth"}}
    assert "names weights that are not loaded; add --pretrained" in refusal(file, ModelConfig(NAME, kwargs))


def test_a_models_own_function_gets_its_weights_afterwards(tmp_path):
    @localprop.MODELS.register("plain_net")
    def plain(num_classes=10):
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, num_classes))

    try:
        own = plain(4).state_dict()
        torch.save(own, tmp_path / "plain.pth")
        config = ModelConfig("plain_net", initial_checkpoint=str(tmp_path / "plain.pth"))
        assert_same(built(None, 4, config).model.state_dict(), own)
        model, _, (note,) = built(None, 6, config)
        assert note.endswith("loaded 2 of 4 tensors; new: 3.weight, 3.bias")
        assert not model[3].weight.any()
    finally:
        del localprop.MODELS._entries["plain_net"]


def train(*flags):
    return main(["train", *SHORT, *map(str, flags)])


def test_a_run_from_a_file_needs_it_no_more_and_its_export_is_trained_further(file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train(*VIT, "--initial-checkpoint", file, "--steps", 1, "--experiment", "first", "--epochs", 2) == 0
    assert "loaded 30 of 32 tensors; new: head.weight, head.bias" in " ".join(capsys.readouterr().out.split())
    losses = read_losses(Path("runs/first/losses.csv"))
    assert losses[0][3:] == pytest.approx([math.log(10)], abs=1e-6)
    mean = json.loads(Path("runs/first/run.json").read_text())["evaluation"]["mean"]
    assert mean == [0.5, 0.5, 0.5]  # what timm says of the weights of this model
    file.unlink()
    assert main(["train", "--resume", "runs/first"]) == 0
    assert main(["eval", "runs/first", "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main(["export", "runs/first"]) == 0
    found = {}
    exec(capsys.readouterr().out.partition("\n\n")[2], found)  # the line that it prints
    weights = load_file("runs/first/model.safetensors")
    assert_same(found["model"].state_dict(), weights)
    for number, flags in enumerate(
        [
            ("--model", "local-dir:runs/first/export"),
            ("--initial-checkpoint", "runs/first/export"),
            ("--initial-checkpoint", "runs/first"),
            (*VIT, "--initial-checkpoint", "runs/first/model.safetensors"),
        ]
    ):
        assert train(*flags, "--steps", 1, "--lr", 0, "--weight-decay", 0, "--experiment", str(number)) == 0
        assert "loaded 32 of 32 tensors" in " ".join(capsys.readouterr().out.split())
        assert_same(load_file(f"runs/{number}/model.safetensors"), weights)
        description = json.loads(Path(f"runs/{number}/run.json").read_text())
        assert (description["model"], description["evaluation"]["mean"]) == (NAME, mean)


def test_a_folder_says_how_images_are_shown(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 16, 16], "num_classes": 7}
    record = {"architecture": NAME, "pretrained_cfg": settings, "model_args": KWARGS}
    Path("config.json").write_text(json.dumps(record))
    assert train("--model", "local-dir:.", "--steps", 1, "--experiment", "run") == 0
    description = json.loads(Path("runs/run/run.json").read_text())
    assert description["evaluation"]["mean"] == [0.1, 0.2, 0.3]
    assert description["evaluation"]["std"] == [0.4, 0.5, 0.6]
    planned = []
    monkeypatch.setattr("localprop.planning.settings.plan_for", lambda model, *_, **__: planned.append(model) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["plan", "--model", "local-dir:.", "--img-size", "16"])
    assert planned[0].embed_dim == KWARGS["embed_dim"]
    assert main(["chain", "local-dir:.", "--img-size", "16"]) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_args": {"checkpoint_path": "/etc/x.pth"}}, "weights may not choose other weights (checkpoint_path"),
        ({"model_args": {"pretrained_cfg": {"url": "https://a.b"}}}, "weights may not choose other weights"),
        ({"model_args": 5}, "does not say what model it is of"),
        ({"architecture": None}, "does not say what model it is of"),
        ({"architecture": "hf-hub:them/theirs"}, "no model is called 'hf-hub:them/theirs'"),
        ({"architecture": "resnet18"}, f"holds weights of resnet18, not of {NAME}"),
    ],
    ids=str,
)
def test_a_strangers_folder_chooses_nothing_else(change, words, file, tmp_path):
    record = {"architecture": NAME, "pretrained_cfg": {}, "model_args": KWARGS, **change}
    (tmp_path / "config.json").write_text(json.dumps(record))
    named = "holds" in words
    config = ModelConfig(
        NAME if named else f"local-dir:{tmp_path}", initial_checkpoint=str(tmp_path) if named else None
    )
    assert words in refusal(None, config)


@pytest.mark.parametrize("flags", [["--model", "resnet18", "--pretrained"], ["--model", "hf-hub:timm/x"]], ids=str)
def test_without_a_hub_the_line_names_the_file_option_at_once(flags, monkeypatch, capsys, tmp_path):
    asked = []

    def unreachable(address, timeout=None):
        asked.append((address, timeout))
        raise OSError(-2, "Name or service not known")

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.create_connection", unreachable)
    assert train(*flags, "--output", tmp_path) == 2
    error = capsys.readouterr().err
    assert "Name or service not known); name weights that you have: --initial-checkpoint FILE" in error
    assert error.count("\n") == 1
    assert len(asked) == 1
    assert asked[0][1] <= 5


LITE = SHARED / "data" / "efficientnet_lite0_timm.safetensors"
SALIENCY = SHARED / "data" / "vits14_saliency_timm.fp16.safetensors"
REAL = [
    (LITE, "tf_efficientnet_lite0", 1000, None, "loaded 296 of 296 tensors"),
    (LITE, "tf_efficientnet_lite0", 17, None, "loaded 294 of 296 tensors; new: classifier.weight, classifier.bias"),
    (SALIENCY, "vit_small_patch14_dinov2", 17, 98, "loaded 174 of 176 tensors; new: head.weight, head.bias"),
]


@pytest.mark.skipif(not LITE.is_file(), reason="pretrained weights are not in ../shared/data")
@pytest.mark.parametrize(("path", "name", "classes", "size", "words"), REAL, ids=str)
def test_real_weights_are_loaded(path, name, classes, size, words):
    model, _, (note,) = built(path, classes, ModelConfig(name, img_size=size, initial_checkpoint=str(path)))
    assert note.endswith(words)
    weights = load_file(path)
    for key, value in model.state_dict().items():
        if key in weights and weights[key].shape == value.shape:
            assert torch.equal(value, weights[key].float()), key
