"""Training images that are held out and evaluated on, of named datasets and of folders."""

import dataclasses
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from localprop.data import sources
from localprop.data.base import Data
from localprop.data.images.folder import File
from localprop.data.images.memory import MemoryStore
from localprop.data.images.streaming import StreamStore
from localprop.data.loading import load_data
from localprop.data.split import hold_out
from localprop.errors import ConfigError, DataError
from localprop.registry import DATASETS
from localprop.settings.config import DataConfig

LARGE, SMALL = 120, 24
COUNTS = {"cat": 21, "dog": 10, "emu": 4}


def write_folder(root: Path, side: int, counts: dict[str, int] = COUNTS) -> Path:
    """Training images alone, each of one grey value that no other has."""
    value = 0
    for name, count in counts.items():
        (root / "train" / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (side, side), (value, value, value)).save(root / "train" / name / f"{number:02}.png")
            value += 1
    return root


def load(data: str, seed: int = 0, img_size: int | None = None, **settings) -> Data:
    return load_data(DataConfig(data=data, **{"workers": 0, "val_split": 0.2} | settings), img_size, seed)


def parts_of(data: Data) -> tuple[list[int], list[int]]:
    """The numbers of a folder's images, in the order in which they were written: trained on and held out."""
    store = data.store
    if isinstance(store, MemoryStore):
        return store.train_images[:, 0, 0, 0].tolist(), store.test_images[:, 0, 0, 0].tolist()
    return [_value(file) for file in store.train_files], [_value(file) for file in store.test_files]


def _value(file: File) -> int:
    with Image.open(file.path) as image:
        return image.getpixel((0, 0))[0]


def flat(images: torch.Tensor) -> Counter:
    return Counter(image.numpy().tobytes() for image in images)


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_a_named_dataset_is_split_without_its_test_images(name, monkeypatch):
    whole = load(name, val_split=0.0)
    assert whole.evaluated_on == "test"
    named = DATASETS[name]

    def read(root, train, download):
        assert train, "the test images were read"
        return named.read(root, train, download)

    monkeypatch.setattr(sources, name.upper(), dataclasses.replace(named, read=read))
    data = load(name, val_split=0.25)
    assert data.evaluated_on == "validation"
    assert data.test_size == -(-whole.train_size // 4)
    assert flat(data.store.train_images) + flat(data.store.test_images) == flat(whole.store.train_images)
    counts, held = (torch.bincount(labels) for labels in (whole.store.train_labels, data.store.test_labels))
    assert (held - counts / 4).abs().max() < 1
    # Labels went with their images.
    known = {image.numpy().tobytes(): label for image, label in _labelled(whole.store, "train")}
    for part in ("train", "test"):
        assert all(known[image.numpy().tobytes()] == label for image, label in _labelled(data.store, part))
    batches = list(data.test_batches(100, "cpu"))
    assert torch.equal(torch.cat([labels for _, labels in batches]), data.store.test_labels)


def _labelled(store: MemoryStore, part: str):
    return zip(getattr(store, f"{part}_images"), getattr(store, f"{part}_labels").tolist(), strict=True)


@pytest.mark.parametrize(("side", "kind"), [(SMALL, MemoryStore), (LARGE, StreamStore)])
def test_a_folder_is_split_by_class_and_needs_no_test_images(tmp_path, side, kind):
    data = load(f"folder:{write_folder(tmp_path, side)}", img_size=32)
    assert isinstance(data.store, kind)
    train, held = parts_of(data)
    assert (data.train_size, data.test_size) == (len(train), len(held)) == (28, 7)
    assert not set(train) & set(held)
    assert sorted(train + held) == list(range(35))
    names = np.repeat(list(COUNTS), list(COUNTS.values()))
    for name, count in COUNTS.items():
        assert abs(sum(names[index] == name for index in held) - 0.2 * count) < 1
    labels = torch.cat([labels for _, labels in data.test_batches(3, "cpu")])
    assert [list(COUNTS)[label] for label in labels] == [names[index] for index in held]
    (batch,) = data.train_batches(0, 28, "cpu")
    assert Counter(batch[1].tolist()) == Counter(list(COUNTS).index(names[index]) for index in train)


def test_every_run_holds_out_the_same_images(tmp_path):
    small, large = write_folder(tmp_path / "small", SMALL), write_folder(tmp_path / "large", LARGE)
    reference = parts_of(load(f"folder:{small}", img_size=32))
    for root, seed in ((small, 1), (large, 0), (large, 7)):
        np.random.seed(seed), torch.manual_seed(seed)
        assert parts_of(load(f"folder:{root}", seed=seed, img_size=32)) == reference
    digits = [load("digits", seed=seed).store.test_images for seed in (0, 1)]
    assert torch.equal(*digits)


@pytest.mark.parametrize("side", [SMALL, LARGE])
def test_test_images_are_not_looked_at(tmp_path, side):
    root = write_folder(tmp_path, side)
    reference = parts_of(load(f"folder:{root}", img_size=32))
    (root / "test" / "fox").mkdir(parents=True)
    (root / "test" / "fox" / "0.png").write_bytes(b"damaged, and of a class that is not trained")
    data = load(f"folder:{root}", img_size=32)
    assert parts_of(data) == reference
    assert sum(len(labels) for _, labels in data.test_batches(4, "cpu")) == 7


@pytest.mark.parametrize("side", [SMALL, LARGE])
def test_an_unreadable_image_is_skipped_in_training_and_refused_in_evaluation(tmp_path, side):
    root = write_folder(tmp_path, side)
    files = sorted((root / "train").glob("*/*"))
    train, held = parts_of(load(f"folder:{root}", img_size=32))
    good = files[train[3]].read_bytes()
    files[train[3]].write_bytes(b"no image")
    data = load(f"folder:{root}", img_size=32)
    list(data.train_batches(0, data.train_size, "cpu"))
    assert data.skipped == [str(files[train[3]])]
    if side == SMALL:
        assert parts_of(data)[1] == held, "a damaged image moved the others"
    files[train[3]].write_bytes(good)
    files[held[2]].write_bytes(b"no image")
    with pytest.raises(DataError, match="evaluation leaves nothing out"):
        list(load(f"folder:{root}", img_size=32).test_batches(4, "cpu"))


def test_without_a_test_folder_the_split_is_pointed_to(tmp_path):
    with pytest.raises(DataError, match=r"no folder test/ or val/.*--val-split"):
        load(f"folder:{write_folder(tmp_path, SMALL)}", val_split=0.0)


@pytest.mark.parametrize("share", [-0.1, 1.0, 5, float("nan")])
def test_a_part_outside_the_range(share):
    with pytest.raises(ConfigError, match=r"--val-split is \S+; it must be at least 0 and below 1$"):
        load("digits", val_split=share)


@pytest.mark.parametrize(
    ("counts", "share"),
    [
        ([9, 1], 0.5),  # scikit-learn refuses a class of one
        ([3, 2], 0.1),  # one image held out of two classes
        ([3, 2], 0.9),  # none left
        ([40, 2], 0.1),  # stratified, and yet none held out
        ([40, 2], 0.9),  # and none left
    ],
)
def test_a_class_with_too_few_images_to_split(counts, share, tmp_path):
    root = write_folder(tmp_path / "pets", SMALL, dict(zip(("cat", "dog"), counts, strict=True)))
    with pytest.raises(DataError) as caught:
        load(f"folder:{root}", val_split=share)
    assert str(caught.value) == (
        f"pets has {counts[1]} training images of class 'dog', too few for --val-split {share} to hold some out and "
        f"leave some; add images, or choose another part"
    )


def test_classes_without_any_image_do_not_matter():
    kept, held = hold_out([0, 0, 2, 2], 0.5, "pets", ["cat", "dog", "emu"])
    assert sorted(kept + held) == [0, 1, 2, 3]
    assert [index // 2 for index in held] == [0, 1]


def test_a_split_has_the_same_order_and_storage_as_the_whole(tmp_path):
    root = write_folder(tmp_path, SMALL)
    # The one large image decides how all are held, wherever it lands.
    Image.new("RGB", (LARGE, LARGE)).save(root / "train" / "emu" / "00.png")
    shutil.copytree(root / "train", root / "test")
    stores = [type(load(f"folder:{root}", img_size=32, val_split=share).store) for share in (0.0, 0.2, 0.8)]
    assert stores == [StreamStore] * 3
    for part in parts_of(load(f"folder:{root}", img_size=32)):
        paths = [path for path in part if path]  # the large one is black
        assert paths == sorted(paths)
