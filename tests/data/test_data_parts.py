"""Which parts of a folder are trained on, evaluated during training, and evaluated once after it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from localprop.cli import main
from localprop.data.loading import load_data
from localprop.errors import DataError, listing, suggestion
from localprop.report.results import read_results
from localprop.settings.config import DataConfig
from localprop.training.trainer import Trainer
from ranks import SMALL

CLASSES = ["cat", "dog", "emu"]
FLAGS = [*SMALL, "--batch-size", "8", "--epochs", "2", "--img-size", "16", "--workers", "0"]


def draw(root: Path, side: int = 8, **counts: int) -> Path:
    """So many images of each class in each part."""
    rng = np.random.default_rng(len(counts))
    for part, count in counts.items():
        for name in CLASSES:
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
    return root


def load(root: Path, **settings):
    return load_data(DataConfig(data=f"folder:{root}", **settings), 16, 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run on a folder with train/, val/ and test/; and how often each was evaluated."""
    place = tmp_path_factory.mktemp("parts")
    draw(place / "pets", train=8, val=3, test=5)
    looked, evaluate = [], Trainer.evaluate

    def watch(self, data=None):
        scores = evaluate(self, data)
        looked.append(scores.examples)
        return scores

    flags = ["--data", f"folder:{place / 'pets'}", "--output", str(place), "--experiment", "run"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "evaluate", watch)
        assert main(["train", *FLAGS, *flags]) == 0
        assert main(["train", "--resume", str(place / "run")]) == 0
    assert looked == [9, 9, 15], "val/ after each of two epochs, and test/ once, a resumption included"
    return place


def evaluated(capsys, run: Path, *flags: str) -> dict:
    capsys.readouterr()
    assert main(["eval", str(run), "--device", "cpu", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_settings_are_chosen_on_val_and_test_is_looked_at_once(finished, capsys):
    row = read_results(finished / "run" / "results.csv")[-1]
    found = evaluated(capsys, finished / "run", "--data", f"folder:{finished / 'pets' / 'val'}")
    assert (found["top1"], found["loss"]) == (
        pytest.approx(row.headline, abs=1e-3),
        pytest.approx(row.score("loss"), abs=1e-4),
    )
    description = json.loads((finished / "run" / "run.json").read_text())
    assert description["evaluated_on"] == "validation"
    tested = description["test"]
    found = evaluated(capsys, finished / "run")
    assert (found["images"], found["evaluated_on"]) == (15, "test")
    assert found["top1"] == pytest.approx(tested["accuracy"], abs=1e-3)
    assert found["loss"] == pytest.approx(tested["loss"], abs=1e-4)
    assert len(tested["module_accuracies"]) == len(description["modules"])


def test_the_test_accuracy_is_printed(finished, capsys):
    capsys.readouterr()
    assert main(["train", "--resume", str(finished / "run")]) == 0
    tested = json.loads((finished / "run" / "run.json").read_text())["test"]
    assert f"test accuracy {tested['accuracy']:.2f}%, of 15 images" in capsys.readouterr().out


@pytest.mark.parametrize("side", [8, 100])
def test_each_part_has_its_images(tmp_path, side):
    root = draw(tmp_path / "pets", side, train=4, val=2, test=3)
    data = load(root)
    assert (data.train_size, data.test_size, data.evaluated_on) == (12, 6, "validation")
    assert (data.final.test_size, data.final.evaluated_on, data.final.final) == (9, "test", None)
    labels = [label for _, labels in data.final.test_batches(4, "cpu") for label in labels.tolist()]
    assert labels == [0] * 3 + [1] * 3 + [2] * 3
    early = data.testing_early()
    assert (early.test_size, early.evaluated_on, early.final) == (9, "test", None)
    assert sum(len(labels) for _, labels in early.train_batches(0, 4, "cpu")) == 12
    for part in ("val", "test"):
        shutil.move(root / part, tmp_path / part)
        assert load(root).evaluated_on == "test"
        shutil.move(tmp_path / part, root / part)
    held_out = load(root, val_split=0.25)
    assert (held_out.train_size, held_out.test_size, held_out.final) == (9, 3, None)


def test_a_run_that_was_evaluated_on_test_images_still_is(finished, tmp_path, capsys):
    """As version 0.1 did it where test/ and val/ were both there."""
    run = Path(shutil.copytree(finished / "run", tmp_path / "run"))
    description = json.loads((run / "run.json").read_text())
    for key in ("data_identity", "evaluation", "test"):
        description["evaluated_on"] = "test"
        description |= description.pop(key) if key == "evaluation" else {}
        description.pop(key, None)
    (run / "run.json").write_text(json.dumps(description))
    (run / "results.csv").write_text("".join((run / "results.csv").read_text().splitlines(keepends=True)[:2]))
    assert main(["train", "--resume", str(run), "--data", f"folder:{finished / 'pets'}"]) == 0
    row = read_results(run / "results.csv")[-1]
    assert row.score("loss") == pytest.approx(evaluated(capsys, finished / "run")["loss"], abs=1e-4)
    assert "test" not in json.loads((run / "run.json").read_text())


def test_a_class_without_test_images_is_allowed_and_said(tmp_path):
    root = draw(tmp_path / "pets", train=3, val=2, test=2)
    shutil.rmtree(root / "val" / "dog")
    for number in range(2):
        (root / "test" / "emu" / f"{number}.png").unlink()
    data = load(root)
    assert (data.test_size, data.final.test_size) == (4, 4)
    assert [label for _, labels in data.test_batches(9, "cpu") for label in labels.tolist()] == [0, 0, 2, 2]
    assert data.notes == [
        f"no images in {root / 'val'} of 'dog': accuracy is of the other classes only",
        f"no images in {root / 'test'} of 'emu': accuracy is of the other classes only",
    ]


@pytest.mark.parametrize("layout", ["test", "val", "test and val", "the folder itself", "some classes"])
def test_other_data_need_no_training_images(finished, tmp_path, capsys, layout):
    other = draw(tmp_path / "other", test=4, val=2)
    for part in {"test": ["val"], "val": ["test"]}.get(layout, []):
        shutil.rmtree(other / part)
    if layout in ("the folder itself", "some classes"):
        other = other / "test"
    if layout == "some classes":
        shutil.rmtree(other / "cat")
    found = evaluated(capsys, finished / "run", "--data", f"folder:{other}")
    assert found["images"] == {"val": 6, "some classes": 8}.get(layout, 12)
    assert found["data"] == other.name
    if layout == "some classes":  # and their labels are the run's
        shutil.move(tmp_path / "other" / "test", tmp_path / "again" / "test")
        draw(tmp_path / "again", train=1)
        whole = evaluated(capsys, finished / "run", "--data", f"folder:{tmp_path / 'again'}")
        assert (whole["images"], whole["loss"]) == (8, found["loss"])


def test_other_data_that_cannot_be_evaluated_are_one_line(finished, tmp_path, capsys):
    other = draw(tmp_path / "other", train=1, test=1)

    def error() -> str:
        capsys.readouterr()
        assert main(["eval", str(finished / "run"), "--data", f"folder:{other}", "--device", "cpu"]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    (other / "test" / "fox").mkdir()
    assert f"{other / 'test'} has folders of classes that are not trained on: 'fox'" in error()
    shutil.rmtree(other / "test")
    assert f"name {other / 'train'}" in error()
    (other / "test").mkdir()
    assert f"no images in {other / 'test'}" in error()


def test_lists_in_messages_are_cut_after_five_names(tmp_path):
    assert listing("abcde") == "a, b, c, d, e"
    assert listing(map(str, range(17))) == "0, 1, 2, 3, 4 and 12 more"
    assert listing(["a\nb\x1b[31m", "é"]) == "a\\nb\\x1b[31m, é"
    assert suggestion("zzz", [f"name{number}" for number in range(9)]).endswith("name4 and 4 more")
    root = draw(tmp_path / "pets", train=1, test=1)
    for number in range(9):
        (root / "train" / f"empty{number}").mkdir()
    with pytest.raises(DataError, match=r"empty4 and 4 more; fill the class folder or delete it$"):
        load(root)
