"""The same step twice gives the same bits, on each device: every method, decoder and head; and --deterministic.

Tests marked gpu are those of the CPU, on CUDA.
"""

import os
from pathlib import Path

import pytest
import timm
import torch
import yaml

from localprop import localize
from localprop.cli import main
from localprop.decoders import DECODERS
from localprop.errors import ConfigError
from localprop.heads import HEADS
from localprop.methods import METHODS
from localprop.runs.repeatable import repeatable_kernels
from localprop.tasks.classification import Classification
from tiny import CLASSES, batch, split

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
devices = pytest.mark.parametrize("device", DEVICES)
LOCAL = [name for name in METHODS if name != "end-to-end"]
CHOICES = [
    {"method": method, "decoder": decoder} for method in ("feature-reconstruction", "infopro") for decoder in DECODERS
]
CHOICES += [{"method": "greedy", "head": head} for head in HEADS]
CHOICES += [
    {"method": "infopro", "method_kwargs": {"task": "contrast"}},
    {"method": "feature-reconstruction", "method_kwargs": {"sample": 0.25}},
    {"method": "trgl"},
    {"method": "auglocal"},
    {"method": "lopt"},
    {"method": "distance"},
]


def gradients(net, images, labels, amp=False):
    """All gradients of one step."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        net.backward(images, labels, seed=1)
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad(set_to_none=True)
    return found


def check(net, images, labels, device, amp=False):
    net, images, labels = net.to(device).train(), images.to(device), labels.to(device)
    first = gradients(net, images, labels, amp)
    assert first
    for _ in range(2):
        again = gradients(net, images, labels, amp)
        assert [name for name in first if not torch.equal(first[name], again[name])] == []


def test_every_method_is_tested():
    assert {options["method"] for options in CHOICES} == set(METHODS) - {"end-to-end"}


@devices
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", ["swin", "cnn"])
@pytest.mark.parametrize("options", CHOICES, ids=lambda options: "-".join(map(str, options.values())))
def test_a_step_gives_the_same_bits_twice(options, name, deterministic, device):
    """Without deterministic algorithms too: these models have no attention over many tokens."""
    with repeatable_kernels(deterministic):
        check(split(name, **options), *batch(8), device)


@devices
@pytest.mark.parametrize("ratio", [(6, 9), (9, 6), (5, 8)])
@pytest.mark.parametrize("decoder", DECODERS)
def test_decoders_to_any_size_give_the_same_bits_twice(decoder, ratio, device):
    """Sizes that do not divide: interpolation, and pooling with windows that overlap."""
    first, second = ratio
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 16, 1), torch.nn.Upsample((first, first)), torch.nn.ReLU()),
        *(torch.nn.Conv2d(16, 16, 1), torch.nn.Upsample((second, second)), torch.nn.ReLU()),
        *(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, CLASSES)),
    )
    net = localize(model, cuts=["0", "3"], decoder=decoder, input_size=(3, 32, 32))
    with repeatable_kernels(True):
        check(net, *batch(8), device)


@devices
def test_attention_over_many_tokens_gives_the_same_bits_twice(device):
    """A ViT in bfloat16 with 325 tokens; on CUDA, attention's own backward adds in any order there."""
    torch.manual_seed(0)
    sizes = {"patch_size": 4, "embed_dim": 64, "depth": 3, "num_heads": 1}
    model = timm.create_model("vit_tiny_patch16_224", img_size=72, num_classes=CLASSES, **sizes)
    net = localize(model, cuts=["blocks.0", "blocks.1"])
    images = torch.randn(8, 3, 72, 72)
    with repeatable_kernels(True):
        check(net, images, torch.arange(8) % CLASSES, device, amp=True)


SMALL = [
    *["--model-kwargs", "patch_size=4", "window_size=2", "embed_dim=12", "depths=(1,1)", "num_heads=(1,2)"],
    *["--min-depth", "0", "--batch-size", "256", "--epochs", "1", "--cuts", "patch_embed", "layers.0"],
]


def train(output: Path, *flags: str) -> int:
    return main(["train", *SMALL, "--output", str(output), "--experiment", "run", *flags])


def weights(output: Path) -> bytes:
    return (output / "run" / "model.safetensors").read_bytes()


@devices
@pytest.mark.parametrize("decoder", DECODERS)
def test_a_resumed_run_equals_an_uninterrupted_one(decoder, device, tmp_path):
    flags = ["--decoder", decoder, "--device", device, *(["--amp"] if device == "cuda" else [])]
    assert train(tmp_path / "whole", *flags) == 0
    assert train(tmp_path / "parts", *flags, "--steps", "3") == 0
    assert main(["train", "--resume", str(tmp_path / "parts" / "run")]) == 0
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


@devices
def test_deterministic_is_recorded_and_followed(device, tmp_path, monkeypatch):
    seen, loss = [], Classification.loss

    def watched(self, *args):
        seen.append((torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
        return loss(self, *args)

    monkeypatch.setattr(Classification, "loss", watched)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert train(tmp_path, "--deterministic", "--steps", "2", "--device", device) == 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["deterministic"] is True
    assert set(seen) == {(True, ":4096:8")}
    seen.clear()
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert set(seen) == {(True, ":4096:8")}
    # The caller's settings are as before.
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert not torch.backends.cudnn.deterministic


def test_on_a_cpu_deterministic_changes_nothing(tmp_path):
    for flags in ([], ["--deterministic"]):
        assert train(tmp_path / str(len(flags)), "--device", "cpu", *flags) == 0
    assert weights(tmp_path / "0") == weights(tmp_path / "1")


def test_an_operation_without_a_deterministic_kernel_is_one_line(tmp_path, monkeypatch, capsys):
    def loss(self, prediction, targets):
        place = torch.zeros(1, dtype=torch.long)
        return (prediction.sum() + torch.zeros(3).put_(place, torch.ones(1)).sum()) * 0.1

    monkeypatch.setattr(Classification, "loss", loss)
    assert train(tmp_path, "--deterministic", "--device", "cpu") == 2
    error = capsys.readouterr().err
    assert "--deterministic: torch has no deterministic put_; leave --deterministic out, or" in error
    assert error.count("\n") == 1


def test_other_errors_are_not_changed():
    with pytest.raises(RuntimeError, match="something else"), repeatable_kernels(True):
        raise RuntimeError("something else")
    assert not torch.are_deterministic_algorithms_enabled()


def test_cublas_that_is_set_up_otherwise_is_one_line(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with repeatable_kernels(True):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    message = "CUBLAS_WORKSPACE_CONFIG to be :4096:8 or :16:8, and it is ':0:0'; unset it"
    with pytest.raises(ConfigError, match=message), repeatable_kernels(True):
        pass
    with repeatable_kernels(False):  # which asks for nothing of it
        pass


@pytest.mark.parametrize("deterministic", [False, True])
def test_convolutions_use_deterministic_algorithms_alone(deterministic):
    assert not torch.backends.cudnn.deterministic
    with repeatable_kernels(deterministic):
        assert torch.backends.cudnn.deterministic
        assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert not torch.backends.cudnn.deterministic
