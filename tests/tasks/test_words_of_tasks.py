"""Tasks whose score is an error, or has no value: what runs, exports and reports say of them."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from bench_records import make_record
from localprop.bench.record import read_record, write_record
from localprop.bench.reports.groups import comparisons_of
from localprop.bench.reports.report import write_report
from localprop.bench.reports.tables import comparison_table, module_table
from localprop.cli import main
from localprop.errors import BenchError
from localprop.registry import TASKS
from localprop.report.measures import Measure
from localprop.report.results import read_results
from localprop.system.plugins import load_plugin
from started_here import started_here

BRIGHTNESS = '''
"""A number for each image: its brightness, in other units."""
import math
import torch
from torch.nn import functional as F
import localprop


@localprop.TASKS.register("brightness")
class Brightness(localprop.Task):
    unit = "picture"
    measures = (
        localprop.Measure("square error", "se", more_is_better=False),
        localprop.Measure("share", "share", percent=True),
        localprop.Measure("fit", "fit"),
    )
    outputs = 1

    def prepare(self, batch, seed, training):
        images, labels = batch
        return [images, 1000 * images.mean((1, 2, 3))[:, None]]

    def target(self, prediction):
        return localprop.Example(prediction)

    def loss(self, prediction, targets):
        return F.mse_loss(prediction, targets)

    def head(self, name, features, prediction):
        return localprop.HEADS.lookup(name)(features, *prediction)

    def sums(self, prediction, targets):
        return torch.stack([(prediction - targets).square().sum(), targets.new_tensor(len(targets))]).double()

    def scores(self, sums):
        error, count = sums.tolist()
        return [error / count, math.nan, -error]
'''
MODEL = {"patch_size": 4, "window_size": 2, "embed_dim": 12, "depths": [1, 1], "num_heads": [1, 2]}
SMALL = ["--model-kwargs", "patch_size=4", "window_size=2", "embed_dim=12", "depths=(1,1)", "num_heads=(1,2)"]
ERROR = Measure("square error", "se", more_is_better=False)


@pytest.fixture
def plugin(tmp_path):
    path = tmp_path / "brightness.py"
    path.write_text(BRIGHTNESS)
    load_plugin(path)
    yield path
    del TASKS["brightness"]
    del sys.modules["localprop_plugin_brightness"]


def scored(error, *args, **kwargs):
    """A record of a task whose headline is an error."""
    record = make_record(*args, accuracy=None, task="brightness", **kwargs)
    heads = [2 * error] * (len(record.network["modules"]) - 1) + [error]
    record.result.update(measure=ERROR.record(), score=error, module_scores=heads)
    return record


def test_a_run_says_what_its_task_measures(plugin, tmp_path, capsys):
    run = tmp_path / "run"
    flags = ["--plugin", str(plugin), "--task", "brightness", "--method", "greedy", "--modules", "2", *SMALL]
    rest = ["--epochs", "2", "--steps", "6", "--batch-size", "64", "--device", "cpu", "--val-split", "0.2"]
    assert main(["train", *flags, *rest, "--output", str(tmp_path), "--experiment", "run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"train --data folder:PATH --model swin_tiny_patch4_window7_224 --task brightness --plugin {plugin}" in said
    (row,) = read_results(run / "results.csv", TASKS["brightness"].measures)
    assert row.score("share") is None
    assert row.score("fit") < 0
    # A score that has no value would make a table that cannot be read.
    assert main(["train", "--resume", str(run), "--plugin", str(plugin), "--steps", "8"]) == 0
    capsys.readouterr()
    assert main(["eval", str(run), "--plugin", str(plugin), "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert {"square error", "fit"} < result.keys()
    assert "share" not in result
    assert main(["export", str(run), "--plugin", str(plugin), "--output", str(tmp_path / "export")]) == 0
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["num_classes"] == 1
    assert "label_names" not in config


def test_a_task_that_mixes_nothing_refuses_mixup(plugin, tmp_path, capsys):
    flags = ["--plugin", str(plugin), "--task", "brightness", "--output", str(tmp_path), "--device", "cpu"]
    assert main(["train", *flags, "--mixup", "0.8"]) == 2
    assert "the task 'brightness' mixes no images; leave out --mixup and --cutmix" in capsys.readouterr().err


def test_a_suite_of_two_tasks_is_reported_in_the_words_of_each(plugin, tmp_path, capsys):
    suite = tmp_path / "tasks.yaml"
    settings = {"model_kwargs": MODEL, "batch_size": 256, "epochs": 1, "steps": 2, "method": "greedy", "modules": 2}
    runs = [{"task": "brightness", "plugin": str(plugin)}, {"task": "classification"}]
    suite.write_text(json.dumps({"description": "Two tasks.", "settings": settings, "runs": runs}))
    folder = tmp_path / "results"
    with started_here():
        assert main(["bench", str(suite), "--plugin", str(plugin), "--output", str(folder), "--device", "cpu"]) == 0
    assert "-%" not in capsys.readouterr().out
    records = {record.config["task"]: record for record in map(read_record, folder.glob("*.json"))}
    found = records["brightness"]
    (row,) = read_results(folder / "runs" / found.run / "results.csv", TASKS["brightness"].measures)
    assert found.measure == TASKS["brightness"].measures[0]
    assert found.module_scores == list(row.heads)
    assert found.score == row.headline > 100  # no percentage could be
    assert "measure" not in records["classification"].result
    assert main(["bench", "report", str(folder)]) == 0
    report = (folder / "report.md").read_text()
    assert "| setting | K | square error | seeds | gap |" in report
    assert "| setting | K | accuracy (%) | seeds | gap (points) |" in report
    assert "Square error of each module's head:" in report


def test_the_best_of_an_error_is_the_least(tmp_path):
    records = [scored(4.0, peak=1000), scored(5.0, lr=1.0, peak=900)]
    records += [scored(6.0, "greedy", 2, peak=800), scored(0.125, "infopro", 2, peak=700)]
    (comparison,) = comparisons_of(records)
    assert comparison.baseline.score.mean == 4.0
    assert "| **0.125** |" in comparison_table(comparison)
    assert "-3.875" in comparison_table(comparison)
    assert "| 12.000 | 6.000 |" in module_table(comparison)
    folder = tmp_path / "small"
    folder.mkdir()
    for record in records:
        write_record(folder / f"{record.run}.json", record)
    written = write_report(folder)
    assert {path.name for path in written} == {"report.md", "pareto.png", "depth.png", "curves.png", "gap.png"}
    assert all(np.ptp(imread(path)) for path in written[1:])
    assert "Square error is the network's after the last epoch" in Path(written[0]).read_text()


def test_runs_of_different_tasks_are_not_compared():
    names = [own.name.partition(",")[0] for own in comparisons_of([make_record(), scored(4.0)])]
    assert names == ["task classification", "task brightness"]


def test_scores_of_another_number_of_modules_are_a_line(tmp_path):
    record = scored(4.0, "greedy", 2)
    record.result["module_scores"].append(1.0)
    write_record(tmp_path / "one.json", record)
    with pytest.raises(BenchError, match=r"one\.json is no result of a run.*module_scores has 3 entries of 2 modules"):
        read_record(tmp_path / "one.json")
