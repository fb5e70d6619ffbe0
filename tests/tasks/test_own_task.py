"""A task in one file, as a plugin: one that counts nothing as an image's label, and ignores some of its targets."""

import json
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import localprop
from localprop import localize, plan
from localprop.cli import main
from localprop.network.carry import Carry
from localprop.registry import TASKS
from localprop.report.results import read_results
from localprop.system.plugins import load_plugin
from localprop.tasks.base import share_of_step
from tiny import SIZE, build

QUADRANTS = '''
"""Each quadrant of an image is brighter than the image, or not; quadrants near the mean are ignored."""
import torch
from torch import nn
from torch.nn import functional as F
import localprop


@localprop.TASKS.register("quadrants")
class Quadrants(localprop.Task):
    unit = "picture"
    measures = (
        localprop.Measure("error", "err", more_is_better=False),
        localprop.Measure("known", "known", percent=True),
    )
    outputs = 4

    def prepare(self, batch, seed, training):
        images, labels = batch
        batch.clear()
        means = F.adaptive_avg_pool2d(images.mean(1, keepdim=True), 2).flatten(1)
        margin = means - means.mean(1, keepdim=True)
        targets = torch.where(margin.abs() < 0.02, -1.0, (margin > 0).float())
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)).to(images.device)
        return [images + 0.01 * noise if training else images, targets]

    def target(self, prediction):
        return localprop.Example(prediction)

    def loss(self, prediction, targets):
        known = targets >= 0
        each = F.binary_cross_entropy_with_logits(prediction, targets.clamp(min=0), reduction="none")
        return (each * known).sum() / known.sum().clamp(min=1)

    def weight(self, targets):
        return (targets >= 0).sum().float()

    def head(self, name, features, prediction):
        return localprop.HEADS.lookup(name)(features, *prediction)

    def sums(self, prediction, targets):
        known = targets >= 0
        wrong = ((prediction > 0) != (targets > 0.5))[known].sum()
        return torch.stack([wrong, known.sum(), known.new_ones((), dtype=torch.long) * known.numel()]).double()

    def scores(self, sums):
        wrong, known, count = sums.tolist()
        return [wrong / known, 100 * known / count]
'''
SMALL = ["--model-kwargs", "patch_size=4", "window_size=2", "embed_dim=12", "depths=(1,1)", "num_heads=(1,2)"]


@pytest.fixture
def plugin(tmp_path):
    path = tmp_path / "quadrants.py"
    path.write_text(QUADRANTS)
    load_plugin(path)
    yield path
    del TASKS["quadrants"]
    del sys.modules["localprop_plugin_quadrants"]


def batches(task, size=8, seed=0):
    images = torch.randn(size, *SIZE, generator=torch.Generator().manual_seed(seed))
    return task.prepare([images, torch.zeros(size)], seed, training=False)


def four(name="mlp"):
    torch.manual_seed(0)
    model = build(name)
    model[-1] = nn.Linear(model[-1].in_features, 4)
    return model


def test_it_trains_is_evaluated_resumed_and_exported_from_the_command_line(plugin, tmp_path, capsys):
    flags = ["--plugin", str(plugin), "--task", "quadrants", "--modules", "2", *SMALL, "--device", "cpu"]
    flags += ["--micro-batches", "4"]
    run = tmp_path / "run"
    rest = ["--batch-size", "64", "--epochs", "3", "--output", str(tmp_path), "--experiment", "run", "--steps", "30"]
    assert main(["train", *flags, *rest]) == 0
    said = capsys.readouterr().out
    assert "test error" in said
    assert "pictures/s" in said
    assert "accuracy" not in said
    header = (run / "results.csv").read_text().splitlines()[0]
    assert "test_err_1,test_err_2,test_known,pictures_per_second" in header
    first = read_results(run / "results.csv")[-1]
    assert main(["train", "--resume", str(run), "--plugin", str(plugin)]) == 0
    last = read_results(run / "results.csv", TASKS["quadrants"].measures)[-1]
    assert last.headline < 0.45
    assert last.headline <= first.headline
    capsys.readouterr()
    assert main(["eval", str(run), "--plugin", str(plugin), "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["error"] == pytest.approx(last.headline, abs=1e-4)
    assert result["pictures"] == 360
    assert main(["export", str(run), "--plugin", str(plugin), "--output", str(tmp_path / "export")]) == 0
    assert load_file(tmp_path / "export" / "model.safetensors")


def test_parts_of_a_batch_count_by_their_known_targets(plugin):
    """With targets that are ignored, micro-batches add up to the gradient of the whole batch, and so do replicas."""
    task, (images, targets) = TASKS["quadrants"](), batches(TASKS["quadrants"]())
    targets[:3] = -1
    targets[:2, 0] = 1
    total, found = task.weight(targets), {}
    for parts in (1, 4):
        net = localize(four(), 2, "greedy", input_size=SIZE, task=task).eval()  # without dropout
        share, losses = partial(share_of_step, task, total, parts), []
        for carry in Carry.micro_batches([images.clone(), targets.clone()], parts, share):
            for k in range(2):
                net.train_module(k, carry, parts=parts)
            losses.append(torch.stack(carry.losses))
        found[parts] = torch.cat([p.grad.flatten() for p in net.parameters()]), torch.stack(losses).mean(0)
    torch.testing.assert_close(found[4], found[1], rtol=1e-4, atol=1e-6)
    assert torch.equal(found[1][1][-1], task.loss(net(images), targets).detach())


def test_a_batch_with_nothing_known_has_a_gradient_of_zero(plugin):
    task = TASKS["quadrants"]()
    images, targets = batches(task)
    carry = Carry(
        images, torch.full_like(targets, -1.0), share=share_of_step(task, torch.zeros(()), 2, targets * 0 - 1)
    )
    net = localize(four(), 1, "end-to-end", input_size=SIZE, task=task)
    net.train_module(0, carry)
    assert all(p.grad.abs().max() == 0 for p in net.parameters() if p.grad is not None)


def test_memory_is_predicted_for_its_targets(plugin):
    task = TASKS["quadrants"]()
    result = plan(four(), 8, modules=[2], method="greedy", input_size=SIZE, task=task)
    assert [row.setting.name for row in result.rows] == ["end-to-end", "end-to-end + ckpt", "K=2"]
    net = localize(four(), 2, "greedy", input_size=SIZE, task=task)
    assert net.task is task
    assert net.local_modules[0].local_loss.task is task


def test_predictions_of_every_module_are_kept_where_they_are_vectors(plugin):
    class Dense(TASKS["quadrants"]):
        def head(self, name, features, prediction):
            return nn.Sequential(super().head(name, features, prediction), nn.Unflatten(1, (2, 2)))

        def loss(self, prediction, targets):
            return super().loss(prediction.flatten(1), targets)

    images, targets = batches(TASKS["quadrants"]())
    net = localize(four(), 2, "greedy", input_size=SIZE, task=Dense())
    assert [None if p is None else p.shape for p in net.backward(images, targets).predictions] == [None, (8, 4)]


def test_a_task_that_is_none_is_told_in_a_line(tmp_path, capsys):
    path = tmp_path / "wrong.py"
    path.write_text("import localprop\nlocalprop.TASKS['wrong'] = len\n")
    try:
        assert main(["train", "--plugin", str(path), "--task", "wrong", "--device", "cpu"]) == 2
    finally:
        del TASKS["wrong"]
    assert "register a subclass of localprop.Task" in capsys.readouterr().err
    assert main(["train", "--task", "clasification", "--device", "cpu"]) == 2
    assert "did you mean 'classification'?" in capsys.readouterr().err


def test_task_and_criterion_exclude_each_other(plugin):
    with pytest.raises(localprop.LocalpropError, match="leave out either task or criterion"):
        localize(four(), 1, "end-to-end", input_size=SIZE, task=TASKS["quadrants"](), criterion=F.cross_entropy)
