"""Code of the user's own, run before methods and models are looked up."""

import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import localprop
from localprop.bench.suite import load_suite
from localprop.cli import main
from localprop.errors import ConfigError
from localprop.registry import METHODS
from localprop.report.results import read_results
from localprop.system.plugins import load_plugin
from places import EXAMPLES


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch):
    monkeypatch.setitem(METHODS, "predsim", None)
    monkeypatch.delitem(METHODS, "predsim")
    yield
    for name in [name for name in sys.modules if name.startswith("localprop_plugin_")]:
        del sys.modules[name]


def test_a_method_of_ones_own_trains_from_the_command_line(tmp_path):
    flags = ["--plugin", str(EXAMPLES / "own_method.py"), "--method", "predsim", "--method-kwargs", "beta=0.5"]
    small = ["--model-kwargs", "patch_size=4", "window_size=2", "embed_dim=12", "depths=(1,1)", "num_heads=(1,2)"]
    rest = ["--epochs", "2", "--batch-size", "64", "--modules", "2", "--output", str(tmp_path), "--experiment", "run"]
    assert main(["train", *flags, *small, *rest, "--device", "cpu"]) == 0
    assert read_results(tmp_path / "run" / "results.csv")[-1].train_losses[0] > 0
    assert main(["eval", str(tmp_path / "run"), "--device", "cpu", *flags[:2]]) == 0


def test_a_suite_with_a_method_of_ones_own_is_the_shipped_one_and_that(monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    runs = load_suite("examples/own_suite.yaml").runs
    assert [run.name for run in runs[-2:]] == ["predsim-k2-s1", "predsim-k4-s1"]
    assert runs[-1].config.backbone.plugin == Path("examples/own_method.py")


def test_cifar_resnets_are_those_of_the_paper_and_can_be_cut_into_sixteen():
    load_plugin(EXAMPLES / "cifar_resnet.py")
    counts = {}
    for depth in (32, 110):
        model = timm.create_model(f"cifar_resnet{depth}", num_classes=10)
        counts[depth] = sum(p.numel() for p in model.parameters())
        convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
        assert len(convolutions) + 1 == depth  # and the classifier
    # He et al., table 6: 0.46 and 1.7 million; the shortcuts' 1 x 1 convolutions add 2,560 weights and 192 of norms.
    assert counts == {32: 464_154 + 2_752, 110: 1_727_962 + 2_752}
    options = {"input_size": (3, 32, 32), "head": "conv", "decoder": "infopro", "min_depth": 0}
    net = localprop.localize(timm.create_model("cifar_resnet32"), 16, "infopro", **options)
    out = net.backward(torch.randn(4, 3, 32, 32), torch.arange(4))
    assert out.losses.shape == (16,)
    assert out.losses.isfinite().all()


DATASET = "DATASETS.register('mine', localprop.ImageDataset"

PLAIN = """
from timm.models import register_model
from torch import nn

@register_model
def plain_cnn(pretrained=False, num_classes=10, **kwargs):
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)),
    )
"""


@pytest.mark.parametrize("pretrained", [[], ["--pretrained"]])
def test_a_model_without_pretrained_cfg_is_trained_evaluated_and_exported(tmp_path, pretrained, capsys):
    plugin = tmp_path / "plain.py"
    plugin.write_text(PLAIN)
    flags, place = ["--plugin", str(plugin), "--device", "cpu"], str(tmp_path / "run")
    rest = ["--modules", "2", "--method", "greedy", "--epochs", "1", "--batch-size", "512", "--output", str(tmp_path)]
    assert main(["train", *flags, "--model", "plain_cnn", *pretrained, *rest, "--experiment", "run"]) == 0
    assert main(["eval", place, *flags]) == 0
    assert main(["export", place, *flags[:2]]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    found = {}
    exec(captured.out.rpartition(f"{place}/export\n")[2], found)  # the printed code
    weights = load_file(f"{place}/model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in found["model"].state_dict().items())
    description = json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    assert (description["architecture"], description["num_classes"]) == ("plain_cnn", 10)


ALL_KINDS = """
import numpy as np
import torch
from torch import nn

import localprop

@localprop.METHODS.register("sum")
class Sum(localprop.LocalLoss):
    def __init__(self, spec):
        super().__init__()
        self.head = localprop.HEADS[spec.head](spec.output, spec.num_classes)
        self.decoder = localprop.DECODERS[spec.decoder](spec.output, spec.image)
        self.criterion = spec.criterion
    def forward(self, output, inputs, images, labels):
        logits = self.head(output)
        return self.criterion(logits, labels) + (self.decoder(output) - images).square().mean(), logits
    def predict(self, output):
        return self.head(output)

@localprop.HEADS.register("corner")
class Corner(nn.Module):
    def __init__(self, layout, num_outputs):
        super().__init__()
        self.layout, self.linear = layout, nn.Linear(layout.channels, num_outputs)
    def forward(self, features):
        return self.linear(self.layout.grid(features)[:, :, 0, 0])

@localprop.DECODERS.register("grey")
class Grey(nn.Module):
    def __init__(self, source, target):
        super().__init__()
        self.source, self.target, self.scale = source, target, nn.Parameter(torch.ones(1))
    def forward(self, features):
        mean = self.source.grid(features).mean((1, 2, 3), keepdim=True) * self.scale
        return mean.expand(-1, self.target.channels, self.target.height, self.target.width)

def stripes(folder, train, download):
    labels = np.arange(256 if train else 64) % 2
    images = np.zeros((len(labels), 3, 8, 8), np.uint8)
    images[labels == 0, :, ::2] = 255
    images[labels == 1, :, :, ::2] = 255
    return images, labels, ["rows", "columns"]

localprop.DATASETS.register("stripes", localprop.ImageDataset(stripes, 8, (0.5,) * 3, (0.5,) * 3, hflip=0))

@localprop.MODELS.register("two-convolutions")
def two_convolutions(num_classes, width=8):
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 8, 3, stride=2), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)),
    )
"""


def test_one_file_adds_a_method_a_head_a_decoder_a_dataset_and_a_model(tmp_path, capsys):
    plugin = tmp_path / "kinds.py"
    plugin.write_text(ALL_KINDS)
    named = ["--method", "sum", "--head", "corner", "--decoder", "grey", "--data", "stripes"]
    model = ["--model", "two-convolutions", "--model-kwargs", "width=6"]
    flags, place = ["--plugin", str(plugin), "--device", "cpu"], str(tmp_path / "run")
    rest = ["--modules", "2", "--min-depth", "0", "--epochs", "8", "--batch-size", "32", "--lr", "0.02"]
    assert main(["train", *flags, *named, *model, *rest, "--output", str(tmp_path), "--experiment", "run"]) == 0
    assert "localprop.MODELS['two-convolutions'](width=6, num_classes=2)" in capsys.readouterr().out
    assert main(["eval", place, *flags]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] > 95
    assert main(["train", "--resume", place, *flags, "--epochs", "8"]) == 0
    sizes = ["--img-size", "8", "--num-classes", "2", "--picture", str(tmp_path / "plan.png")]
    assert main(["plan", *flags[:2], *named[:6], *model, *sizes]) == 0
    capsys.readouterr()
    assert main(["export", place, *flags[:2]]) == 0
    found = {}
    exec(capsys.readouterr().out.rpartition(f"{place}/export\n")[2], found)  # the printed code
    weights = load_file(f"{place}/model.safetensors")
    assert weights["0.weight"].shape == (6, 3, 3, 3)
    assert all(torch.equal(value, weights[name]) for name, value in found["model"].state_dict().items())


@pytest.mark.parametrize(
    ("code", "words", "line"),
    [
        ("METHODS.register('greedy', int)", "", "localprop has a method called 'greedy'; register yours under another"),
        ("HEADS['mlp'] = int", "", "localprop has a head called 'mlp'"),
        ("MODELS.register('resnet18', print)", "--model resnet18", "timm has a model called 'resnet18'"),
        ("MODELS.register('mine', dict)", "--model mine", "model 'mine' is built as a dict; return a torch module"),
        ("MODELS.register('mine', abs)", "--model mine", "mine cannot be built with --model-kwargs"),
        ("MODELS.register('mine', abs)", "--model mien", "no model is called 'mien'; did you mean 'mine'?"),
        ("DATASETS.register('mine', print)", "--data mine", "register a localprop.ImageDataset"),
        (f"{DATASET}(lambda *_: 3, 8, (0,), (1,)))", "--data mine", "mine cannot be read (cannot unpack"),
        (f"{DATASET}(lambda *_: ([], [], []), 8, (0,), (1,)))", "--data mine", "expected (count, 3, side, side) and"),
    ],
)
def test_what_a_plugin_registers_wrongly_is_one_line(tmp_path, code, words, line, capsys):
    (tmp_path / "wrong.py").write_text(f"import localprop\nlocalprop.{code}\n")
    flags = ["--plugin", str(tmp_path / "wrong.py"), "--device", "cpu", "--output", str(tmp_path)]
    assert main(["train", *flags, *words.split()]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("none.py", None, "there is no such file"),
        ("text.txt", "x = 1", "its name ends with .py"),
        ("broken.py", "x = (", "fails (SyntaxError"),
        ("failing.py", "raise ValueError('two\\nlines')", "fails (ValueError: two)"),
    ],
)
def test_a_plugin_that_cannot_run_is_one_line(tmp_path, name, content, line):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_plugin(tmp_path / name)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_plugin_runs_once(tmp_path):
    (tmp_path / "count.py").write_text("import builtins\nbuiltins.counted = getattr(builtins, 'counted', 0) + 1\n")
    for _ in range(2):
        load_plugin(tmp_path / "count.py")
    assert sys.modules["builtins"].counted == 1
    del sys.modules["builtins"].counted
