"""A run knows its data again: what changed in a folder is noticed before a resumed run writes anything."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from localprop.bench.collect import collect
from localprop.bench.record import write_record
from localprop.bench.runner import Runner
from localprop.bench.suite import load_suite
from localprop.cli import main
from localprop.data.loading import folder_identity, load_data
from localprop.errors import BenchError
from localprop.settings.config import DataConfig
from ranks import SMALL

CLASSES = ["cat", "dog", "emu"]
FLAGS = [*SMALL, "--batch-size", "8", "--epochs", "1", "--crop-pad", "1", "--workers", "0"]


def draw(root: Path) -> Path:
    """Eight training images and two test images of each class, of 8 pixels."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 2)):
        for name in CLASSES:
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.png", compress_level=0)
    return root


def identity(root: Path, **settings) -> dict:
    config = DataConfig(data=f"folder:{root}", **settings)
    found = folder_identity(config)
    assert found == load_data(config, 8, 0).identity == json.loads(json.dumps(found))
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run on a folder of images, and that folder."""
    place = tmp_path_factory.mktemp("identity")
    draw(place / "pets")
    flags = ["--data", f"folder:{place / 'pets'}", "--img-size", "16", "--output", str(place), "--experiment", "run"]
    assert main(["train", *FLAGS, *flags]) == 0
    return place


@pytest.fixture
def place(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rename_a_class(pets: Path) -> None:
    for part in ("train", "test"):
        (pets / part / "cat").rename(pets / part / "fox")


def swap_two_images(pets: Path) -> None:
    (pets / "train" / "cat" / "0.png").rename(pets / "train" / "cat" / "00.png")


def edit_an_image(pets: Path) -> None:
    Image.new("RGB", (8, 8)).save(pets / "test" / "emu" / "1.png")


def add_images(pets: Path) -> None:
    for number in (1, 2):
        shutil.copy(pets / "train" / "dog" / "1.png", pets / "train" / "dog" / f"{number}-copy.png")


def remove_a_class(pets: Path) -> None:
    for part in ("train", "test"):
        shutil.rmtree(pets / part / "dog")


CHANGES = {
    rename_a_class: "class 0 was 'cat' and is now 'dog', class 1 was 'dog' and is now 'emu', "
    "class 2 was 'emu' and is now 'fox'; restore",
    swap_two_images: "as many images of the same classes, with other names or sizes; restore",
    edit_an_image: "with other names or sizes",
    add_images: "training images: 24 then, 26 now; restore them, or start a new run",
    remove_a_class: "class 'dog' is gone; training images: 24 then, 16 now; evaluated images: 6 then, 4 now",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_run_is_not_resumed_on_other_data(place, capsys, change):
    change(place / "pets")
    before = content(place / "run")
    assert main(["train", "--resume", str(place / "run"), "--data", f"folder:{place / 'pets'}"]) == 2
    message = capsys.readouterr().err
    assert f"the data are not those of {place / 'run'}: " in message
    assert CHANGES[change] in message
    assert message.count("\n") == 1
    assert content(place / "run") == before


def test_the_same_data_elsewhere_are_the_same(place, capsys):
    moved = shutil.move(place / "pets", place / "animals")
    assert main(["train", "--resume", str(place / "run"), "--data", f"folder:{moved}"]) == 0
    assert "cannot be told" not in capsys.readouterr().out


def test_an_identity_is_of_what_is_looked_at(tmp_path):
    root = draw(tmp_path / "pets")
    whole, split = identity(root), identity(root, val_split=0.25)
    assert (whole["train_images"], whole["evaluated_images"]) == (24, 6)
    assert (split["train_images"], split["evaluated_images"]) == (18, 6)
    edit_an_image(root)
    assert identity(root) != whole
    assert identity(root, val_split=0.25) == split, "with --val-split the test images are not read"


def test_named_data_have_an_identity_too():
    found = load_data(DataConfig(), None, 0).identity
    assert found["source"] == "digits"
    assert (found["train_images"], found["evaluated_images"], len(found["classes"])) == (1437, 360, 10)


def test_a_run_of_version_0_1_is_resumed_with_a_line(place, capsys):
    path = place / "run" / "run.json"
    description = json.loads(path.read_text())
    del description["data_identity"]
    path.write_text(json.dumps(description))
    resume = ["train", "--resume", str(place / "run"), "--data", f"folder:{place / 'pets'}"]
    assert main(resume) == 0
    assert "whether its images are still the same cannot be told" in " ".join(capsys.readouterr().out.split())
    add_images(place / "pets")
    assert main(resume) == 2
    assert "training images: 24 then, 26 now" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [5, [], {"classes": 3}, {"classes": [1]}, {"train_images": "x"}, {"files": 7}])
def test_a_damaged_identity_is_one_line(place, capsys, damage):
    path = place / "run" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data_identity": damage}))
    assert main(["train", "--resume", str(place / "run"), "--data", f"folder:{place / 'pets'}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_bench_does_not_take_results_of_other_data(place):
    suite, out = place / "one.yaml", place / "out"
    kwargs = "{patch_size: 4, window_size: 2, embed_dim: 12, depths: [1, 1], num_heads: [1, 2]}"
    settings = (
        f"data: cifar10, epochs: 1, batch_size: 8, crop_pad: 1, min_depth: 0, img_size: 16, model_kwargs: {kwargs}"
    )
    suite.write_text(f"settings: {{{settings}}}\nruns: [{{}}]")
    (run,) = load_suite(str(suite), {}).runs
    record = collect(place / "run", "one", run, 1)
    out.mkdir()

    def bench(pets: Path) -> list[str]:
        runner = Runner(load_suite(str(suite), {}), out, data={"cifar10": str(pets)})
        return [job.state for job in runner.run(lambda jobs: None)]

    for identity in (record.data["identity"], None):  # version 0.1 recorded none
        write_record(out / f"{run.name}.json", replace(record, data=record.data | {"identity": identity}))
        assert bench(place / "pets") == ["done"]
    write_record(out / f"{run.name}.json", record)
    assert bench(shutil.move(place / "pets", place / "animals")) == ["done"], "it lies elsewhere, and is the same"
    assert bench(place / "nowhere") == ["done"]
    add_images(place / "animals")
    with pytest.raises(BenchError, match=r"training images: 24 then, 26 now; .* delete it to run it again$"):
        bench(place / "animals")
