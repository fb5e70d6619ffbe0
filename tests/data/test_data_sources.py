"""The named datasets, read from small files in their true on-disk formats.

torchvision compares files with published checksums; the tests put those of the small files in their place, so
that the comparison itself still runs.
"""

import hashlib
import pickle
import re
import struct
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from torchvision import datasets

from localprop.data.base import Data
from localprop.data.loading import load_data
from localprop.errors import DataError
from localprop.settings.config import DataConfig

RNG = np.random.default_rng(0)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def pixels(count: int, side: int) -> np.ndarray:
    """Images as (images, rows, columns, channels)."""
    return RNG.integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def write_cifar(root: Path, monkeypatch, kind) -> list[np.ndarray]:
    """Rows of 3072 bytes, red plane first, in pickled dicts, as Krizhevsky's archives have them."""
    base, written = root / kind.base_folder, []
    base.mkdir(parents=True)
    key = kind.meta["key"]
    label_key = "labels" if kind is datasets.CIFAR10 else "fine_labels"
    classes = 10 if kind is datasets.CIFAR10 else 100

    def write(name: str, content: dict) -> list[str]:
        (base / name).write_bytes(pickle.dumps(content, protocol=2))
        return [name, md5(base / name)]

    for attribute in ("train_list", "test_list"):
        entries = []
        for name, _ in getattr(kind, attribute):
            images = pixels(10, 32)
            rows = images.transpose(0, 3, 1, 2).reshape(10, -1)
            labels = [(3 * number + len(written)) % classes for number in range(10)]
            entries.append(write(name, {"data": rows, label_key: labels}))
            written.append((images, labels))
        monkeypatch.setattr(kind, attribute, entries)
    name, checksum = write(kind.meta["filename"], {key: [f"class {number}" for number in range(classes)]})
    monkeypatch.setattr(kind, "meta", {"filename": name, "key": key, "md5": checksum})
    train = [np.concatenate(parts) for parts in zip(*written[:-1], strict=True)]
    return [*train, *map(np.asarray, written[-1])]


def write_stl10(root: Path, monkeypatch, labels=(1, 10, 3)) -> list[np.ndarray]:
    """Bytes ordered by image, channel, column, row; labels count from 1."""
    base, kind = root / "stl10_binary", datasets.STL10
    base.mkdir(parents=True)
    images = {"train": pixels(3, 96), "test": pixels(2, 96)}
    for split, split_labels in (("train", labels), ("test", (2, 9))):
        images[split].transpose(0, 3, 2, 1).tofile(base / f"{split}_X.bin")
        np.array(split_labels, dtype=np.uint8).tofile(base / f"{split}_y.bin")
    pixels(1, 96).tofile(base / "unlabeled_X.bin")
    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(kind, attribute, [[name, md5(base / name)] for name, _ in getattr(kind, attribute)])
    return [images["train"], np.array(labels) - 1, images["test"], np.array([1, 8])]


def write_svhn(root: Path, monkeypatch) -> list[np.ndarray]:
    """MATLAB files with X (rows, columns, channels, images) and y (images, 1), in which 10 stands for 0."""
    root.mkdir(parents=True, exist_ok=True)
    written, entries = [], {}
    for split, labels in (("train", [10, 1, 9]), ("test", [5, 10])):
        images, path = pixels(len(labels), 32), root / f"{split}_32x32.mat"
        scipy.io.savemat(path, {"X": images.transpose(1, 2, 3, 0), "y": np.array(labels, dtype=np.uint8)[:, None]})
        entries[split] = ["http://localhost", path.name, md5(path)]
        written += [images, np.array(labels) % 10]
    monkeypatch.setattr(datasets.SVHN, "split_list", entries)
    return written


def write_fashion_mnist(root: Path, monkeypatch) -> list[np.ndarray]:
    """IDX files: magic number, sizes as big-endian integers, bytes."""
    base, written = root / "FashionMNIST" / "raw", []
    base.mkdir(parents=True)
    for split, labels in (("train", [9, 0, 4]), ("t10k", [7, 8])):
        images, count = pixels(len(labels), 28)[..., 0], len(labels)
        (base / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, count, 28, 28) + images.tobytes())
        (base / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, count) + bytes(labels))
        written += [images[..., None].repeat(3, -1), np.array(labels)]
    return written


WRITERS = {
    "cifar10": lambda root, patch: write_cifar(root, patch, datasets.CIFAR10),
    "cifar100": lambda root, patch: write_cifar(root, patch, datasets.CIFAR100),
    "stl10": write_stl10,
    "svhn": write_svhn,
    "fashion-mnist": write_fashion_mnist,
}
# Number of classes, side in pixels, chance of a flip, and a file that is damaged below.
FACTS = {
    "cifar10": (10, 32, 0.5, "cifar-10-batches-py/data_batch_3"),
    "cifar100": (100, 32, 0.5, "cifar-100-python/test"),
    "stl10": (10, 96, 0.5, "stl10_binary/test_y.bin"),
    "svhn": (10, 32, 0, "test_32x32.mat"),
    "fashion-mnist": (10, 28, 0.5, "FashionMNIST/raw/t10k-images-idx3-ubyte"),
}


def open_named(name: str, root: Path, **settings) -> Data:
    return load_data(DataConfig(data=name, data_dir=root, **settings), None, 0)


def error_of(name: str, root: Path, **settings) -> str:
    with pytest.raises(DataError) as caught:
        open_named(name, root, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", WRITERS)
def test_images_and_labels_are_read_as_written(name, tmp_path, monkeypatch):
    train_images, train_labels, test_images, test_labels = WRITERS[name](tmp_path, monkeypatch)
    data = open_named(name, tmp_path)
    classes, side, hflip, _ = FACTS[name]
    assert (data.num_classes, data.img_size, data.name) == (classes, side, name)
    assert (data.store.hflip, data.store.crop_pad) == (hflip, side // 8)
    assert np.array_equal(data.store.train_images.permute(0, 2, 3, 1), train_images)
    assert np.array_equal(data.store.test_images.permute(0, 2, 3, 1), test_images)
    assert data.store.train_labels.tolist() == train_labels.tolist()
    assert data.store.test_labels.tolist() == test_labels.tolist()
    images, _ = next(data.test_batches(2, "cpu"))
    reference = (test_images[:2] / 255 - data.mean) / data.std
    assert np.allclose(images.permute(0, 2, 3, 1), reference, atol=1e-5)
    assert next(data.train_batches(0, 2, "cpu"))[0].shape == (2, 3, side, side)


@pytest.mark.parametrize("name", WRITERS)
def test_missing_files_are_named(name, tmp_path, monkeypatch):
    damaged = FACTS[name][3]
    assert damaged in error_of(name, tmp_path)
    WRITERS[name](tmp_path, monkeypatch)
    (tmp_path / damaged).unlink()
    assert error_of(name, tmp_path) == (f"{name}: {tmp_path} lacks {damaged}; put them there, or pass --download")


@pytest.mark.parametrize("name", WRITERS)
def test_damaged_files_are_not_trained_on(name, tmp_path, monkeypatch):
    WRITERS[name](tmp_path, monkeypatch)
    path = tmp_path / FACTS[name][3]
    path.write_bytes(path.read_bytes()[:-1])
    message = error_of(name, tmp_path)
    assert message.startswith(f"{name} cannot be read (")
    assert str(tmp_path / FACTS[name][3].split("/")[0]) in message
    assert "--download" in message


@pytest.mark.parametrize("name", WRITERS)
def test_a_failed_download_is_one_line(name, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    message = error_of(name, tmp_path / "new", download=True)
    assert message.startswith(f"{name} could not be downloaded (")
    assert FACTS[name][3] in message


def test_labels_without_a_class_are_refused(tmp_path, monkeypatch):
    write_stl10(tmp_path, monkeypatch, labels=(1, 11, 3))
    assert "label 10, outside 0 to 9" in error_of("stl10", tmp_path)


def test_as_many_labels_as_images_are_needed(tmp_path, monkeypatch):
    write_stl10(tmp_path, monkeypatch, labels=(1, 2))
    assert re.search("3 images and 2 labels", error_of("stl10", tmp_path))


def test_synthetic_is_random_pixels_without_files(tmp_path):
    data = open_named("synthetic", tmp_path / "none")
    store = data.store
    assert (data.num_classes, data.img_size, store.hflip, store.crop_pad) == (10, 32, 0.5, 4)
    assert store.train_images.shape == (1024, 3, 32, 32)
    assert store.test_images.shape == (64, 3, 32, 32)
    assert store.train_images.dtype == torch.uint8
    for labels in (store.train_labels, store.test_labels):
        assert set(labels.tolist()) == set(range(10))
    # Of 3 million draws from 256 values each comes 12288 times, give or take 111.
    counts = torch.bincount(store.train_images.flatten(), minlength=256)
    assert (counts - 12288).abs().max() < 6 * 111
    scaled = store.train_images.double() / 255
    assert data.mean == pytest.approx([scaled.mean().item()] * 3, abs=2e-3)
    assert data.std == pytest.approx([scaled.std().item()] * 3, abs=2e-3)
    assert len({image.numpy().tobytes() for image in torch.cat([store.train_images, store.test_images])}) == 1088


def test_synthetic_is_the_same_each_time_and_of_any_size():
    first = load_data(DataConfig(data="synthetic"), 64, 0)
    torch.manual_seed(1)
    second = load_data(DataConfig(data="synthetic"), 64, 1)
    assert torch.equal(first.store.train_images, second.store.train_images)
    assert torch.equal(first.store.test_images, second.store.test_images)
    assert first.store.train_images.shape[-1] == 32, "resized on the device, batch by batch"
    assert next(first.train_batches(0, 8, "cpu"))[0].shape == (8, 3, 64, 64)
    assert next(first.test_batches(8, "cpu"))[0].shape == (8, 3, 64, 64)
