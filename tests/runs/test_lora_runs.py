"""Runs with LoRA adapters, by the real commands: resumed, evaluated, exported, trained further, planned."""

import json
import sys

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file

from adapters import WHY
from localprop.cli import main
from localprop.models.backbone import create_backbone
from localprop.report.results import read_results
from localprop.runs.recorded_settings import read_config
from localprop.settings.config import ModelConfig, TrainConfig
from localprop.settings.flat import from_flat, to_flags
from localprop.settings.rates import rate_notes, with_usual_rates
from localprop.training.checkpoints.loading import newest_checkpoint
from localprop.training.checkpoints.parts import whole_weights
from tiny import assert_same

pytest.importorskip("peft", reason=WHY)

NAME = "vit_tiny_patch16_224"
KWARGS = {"patch_size": 4, "depth": 2, "embed_dim": 24, "num_heads": 2}
VIT = ["--model", NAME, "--model-kwargs", *(f"{key}={value}" for key, value in KWARGS.items())]
SHORT = ["--epochs", "2", "--batch-size", "256", "--device", "cpu", "--seed", "5", "--lora", "2"]
LOCAL = ["--method", "greedy", "--cuts", "blocks.0", "--model-ema", "--model-ema-decay", "0.5", "--amp"]
LOCAL += ["--micro-batches", "2", "--drop-path", "0.2", "--finish", "0.5"]
EXACT = ["--method", "end-to-end", "--cuts", "blocks.0", "--clip-grad", "1", "--grad-checkpointing"]
EXACT += ["--freeze", "blocks.0"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the weights of a model that has been trained before, and a finished run from them."""
    folder = tmp_path_factory.mktemp("lora")
    torch.manual_seed(3)
    model = timm.create_model(NAME, img_size=16, num_classes=10, **KWARGS)
    save_file(model.state_dict(), folder / "weights.safetensors")
    assert train(folder, "run", *LOCAL) == 0
    return folder


def train(place, name, *flags):
    weights = ["--initial-checkpoint", str(place / "weights.safetensors")]
    return main(["train", *VIT, *SHORT, *weights, "--output", str(place), "--experiment", name, *flags])


def with_adapters_of(run):
    """The model of a run as it was trained, from its last checkpoint."""
    config = read_config(run)
    model = create_backbone(config.backbone, 10).model
    checkpoint, _ = newest_checkpoint(run / "checkpoints")
    model.load_state_dict(whole_weights(checkpoint.parts))
    return model.eval()


def test_an_export_is_a_plain_model_with_the_same_logits_and_needs_no_peft(place, tmp_path, monkeypatch, capsys):
    trained, images = with_adapters_of(place / "run"), torch.randn(8, 3, 16, 16)
    base = load_file(place / "weights.safetensors")
    weights = load_file(place / "run" / "model.safetensors")
    assert weights.keys() == base.keys()
    changed = {key for key in base if not torch.equal(base[key], weights[key])}
    linear = [("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")] * 2
    assert changed == {
        *(f"blocks.{i}.{name}.weight" for i, own in enumerate(linear) for name in own),
        *("head.weight", "head.bias"),
    }
    row = read_results(place / "run" / "results.csv")[-1]
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(["export", str(place / "run"), "--output", str(tmp_path / "out")]) == 0
    exported = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert_same(exported.state_dict(), weights)
    expected = trained(images)
    torch.testing.assert_close(exported(images), expected, rtol=1e-5, atol=1e-5)
    timm.create_model(NAME, img_size=16, num_classes=10, **KWARGS).load_state_dict(weights)
    capsys.readouterr()
    assert main(["eval", str(place / "run"), "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["top1"] == pytest.approx(row.headline, abs=0.3)  # one image: the run evaluated in mixed precision
    assert result["loss"] == pytest.approx(row.score("loss"), abs=1e-3)


@pytest.mark.parametrize("flags", [LOCAL, EXACT], ids=["local", "exact"])
def test_a_run_that_was_stopped_goes_on_with_the_bits_of_one_that_was_not(flags, place, tmp_path, capsys):
    (tmp_path / "weights.safetensors").write_bytes((place / "weights.safetensors").read_bytes())
    if flags is EXACT:
        assert train(place, "exact", *flags) == 0
    assert train(tmp_path, "again", *flags, "--steps", "7") == 0
    (tmp_path / "weights.safetensors").unlink()
    assert main(["train", "--resume", str(tmp_path / "again")]) == 0
    whole = place / ("exact" if flags is EXACT else "run")
    assert_same(*(load_file(run / "model.safetensors") for run in (whole, tmp_path / "again")))
    (tmp_path / "again" / "model.safetensors").unlink()  # then the weights are those of the checkpoint
    assert main(["export", str(tmp_path / "again")]) == 0
    assert_same(*(load_file(run / "model.safetensors") for run in (whole, tmp_path / "again" / "export")))
    if flags is EXACT:
        base, weights = load_file(place / "weights.safetensors"), load_file(whole / "model.safetensors")
        assert torch.equal(base["blocks.0.attn.qkv.weight"], weights["blocks.0.attn.qkv.weight"])
        assert not torch.equal(base["blocks.1.attn.qkv.weight"], weights["blocks.1.attn.qkv.weight"])


def test_a_run_is_trained_further_with_other_adapters_or_none(place, capsys):
    run = place / "run"
    more = ["--modules", "1", "--method", "end-to-end", "--epochs", "1", "--steps", "1", "--device", "cpu"]
    more += ["--batch-size", "256", "--output", str(place)]
    for name, flags in {"without": [], "other": ["--lora", "3", "--lora-targets", "qkv", "--lora-alpha", "6"]}.items():
        capsys.readouterr()
        assert main(["train", "--initial-checkpoint", str(run), *more, "--experiment", name, *flags]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "loaded 32 of 32 tensors" in shown
        # A: 3 x 24, B: 72 x 3, twice; and the classifier.
        assert ("LoRA of rank 3 beside 2 layers: 826 of the backbone's" in shown) == bool(flags)
    settings = yaml.safe_load((place / "other" / "config.yaml").read_text())
    assert (settings["lora"], settings["lora_alpha"], settings["lora_targets"]) == (3, 6.0, ["qkv"])


def test_adapters_learn_at_the_rate_of_new_parts():
    config = from_flat({"initial_checkpoint": "x", "lora": 8}, "here")
    usual = with_usual_rates(config, ())
    assert (usual.optim.lr, usual.optim.backbone_lr_scale) == (1e-3, 1.0)
    assert rate_notes(usual) == []
    assert "--lora freezes random weights" in rate_notes(TrainConfig(backbone=ModelConfig(lora=8)))[0]
    words = to_flags(from_flat({"lora": 8, "lora_targets": ["qkv", "fc?"], "lora_alpha": 4}, "here"))
    assert words == ["--lora", "8", "--lora-alpha", "4.0", "--lora-targets", "qkv", "fc?"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lora", "0"], "--lora is 0; it must be at least 1"),
        (["--lora", "x"], "--lora is 'x'; it must be a whole number"),
        (["--lora-alpha", "0", "--lora", "2"], "--lora-alpha is 0.0; it must be above 0"),
        (["--lora-targets", "qkv"], "--lora-alpha and --lora-targets are about adapters; add --lora 8, their rank"),
        (["--lora", "2", "--lora-targets", "qkw"], "no layer is called 'qkw'; did you mean 'qkv'?"),
        (
            ["--lora", "2", "--freeze", "all"],
            "every unit that has adapters is frozen: freeze less, or leave out",
        ),
    ],
)
def test_flags_that_are_wrong_get_a_line(flags, words, tmp_path, capsys):
    assert main(["train", *VIT, "--img-size", "16", *flags, "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_plan_is_made_of_the_model_with_adapters(monkeypatch):
    planned = []
    monkeypatch.setattr("localprop.planning.settings.plan_for", lambda model, *_, **__: planned.append(model) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["plan", *VIT, "--img-size", "16", "--lora", "2"])
    pairs = {f"blocks.{i}.attn.qkv.lora_{half}.default.weight" for i in (0, 1) for half in "AB"}
    trained = {name for name, parameter in planned[0].named_parameters() if parameter.requires_grad}
    assert pairs < trained
    assert "blocks.0.attn.qkv.base_layer.weight" not in trained
