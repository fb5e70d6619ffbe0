"""What the records of fine-tuning come to, in the package's known gaps and in docs/finetuning.md."""

import json
import sys
from dataclasses import asdict

import pytest
import yaml

from bench_records import make_record
from places import ROOT

sys.path.append(str(ROOT / "benchmarks"))  # as for a script that lies there

import finetuned
import publish_finetuning
import publish_known


def test_the_page_has_the_tables_of_the_results():
    page = publish_finetuning.PAGE.read_text(encoding="utf-8")
    for name, text in publish_finetuning.parts().items():
        assert f"<!-- {name} -->\n\n{text}\n\n<!-- /{name} -->" in page


@pytest.fixture
def records(tmp_path, monkeypatch):
    """Two seeds of each way at a good and a bad learning rate; one of another partition, and one of other data."""
    own = {"model": "vit_small_patch14_dinov2", "data": "folder:flowers17", "img_size": 98}
    ways = {
        (): (80.0, 100, 1.0),
        ("freeze",): (60.0, 10, 0.4),
        ("half",): (78.0, 50, 0.6),
        ("greedy", 4): (70.0, 40, 0.9),
        ("greedy", 4, "first"): (75.0, 30, 0.7),
        ("greedy", 4, "cuts"): (99.0, 1, 0.1),
    }
    options = {
        "freeze": {"freeze": ["all"]},
        "half": {"modules": 2, "freeze_modules": 1},
        "first": {"freeze_modules": 1},
        "cuts": {"cuts": ["a"]},
    }
    folder = tmp_path / "finetune-vit"
    folder.mkdir()
    for way, (accuracy, peak, step) in ways.items():
        more = {key: value for name in way for key, value in options.get(name, {}).items()}
        if "greedy" in way:
            more |= {"method": "greedy", "modules": 4}
        for seed in (1, 2):
            for lr, less in ((1e-3, 0), (3e-3, 20)):
                lost = less + (seed if "half" in way else 0)
                made = make_record(accuracy=accuracy - lost, peak=peak, step=step, seed=seed, lr=lr, **own, **more)
                made.cost["jobs"] = 1
                name = f"{'-'.join(map(str, way))}-{lr}-{seed}.json"
                (folder / name).write_text(json.dumps(asdict(made)))
    alone = make_record(method="greedy", modules=4, **(own | {"data": "folder:svhn10k"}))
    (folder / "alone.json").write_text(json.dumps(asdict(alone)))
    monkeypatch.setattr(finetuned, "RESULTS", tmp_path)


def test_each_way_is_told_at_its_best_learning_rate_against_end_to_end(records):
    (task,) = finetuned.tasks("finetune-vit")
    assert (task.data, task.protocol) == ("flowers17", "98 px, 24 epochs, test images")
    gaps = {(way.method, way.frozen): task.gap(way) for way in task.outcomes}
    assert gaps == {
        ("end-to-end", ""): (0.0, 2),
        ("end-to-end", "all"): (-20.0, 2),
        ("end-to-end", "half"): (-3.5, 2),  # seeds lost 3 and 4 points
        ("greedy", ""): (-10.0, 2),
        ("greedy", "first"): (-5.0, 2),
    }
    first = task.outcomes[finetuned.Way("greedy", 4, 0, "first")]
    assert (first.lr, first.memory, first.time) == (1e-3, 0.3, 0.7)


def test_known_gaps_and_the_page_have_them(records):
    group = yaml.safe_load(publish_known.content())[-1]
    assert group["protocol"] == "fine-tuning, vit_small_patch14_dinov2, flowers17, 98 px, 24 epochs, test images"
    half = {"method": "end-to-end", "modules": 1, "trained": True, "frozen": "half", "gaps": [-3.5], "seeds": 2}
    assert half in group["rows"]
    assert {row.get("frozen") for row in group["rows"]} == {None, "half", "first"}
    text = publish_finetuning.parts()["evidence"]
    assert "| first half frozen | 76.5 | -3.5 | 2 | 0.001 | 0.50 | 0.60 |" in text
    assert "| end-to-end | 80.0 |  | 2 | 0.001 | 1.00 | 1.00 |" in text
    assert text.index("greedy, K=4, first module frozen") < text.index("| greedy, K=4 |")
