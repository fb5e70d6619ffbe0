"""Folders of images, held in memory or streamed: content, determinism, damaged files, users' mistakes."""

import pickle
import random
import tarfile
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from localprop.data.base import Data
from localprop.data.images import streaming
from localprop.data.images.decoding import small_sizes
from localprop.data.images.memory import MemoryStore
from localprop.data.images.reading import read_image
from localprop.data.images.streaming import StreamStore
from localprop.data.images.walk import File
from localprop.data.loading import load_data
from localprop.errors import ConfigError, DataError
from localprop.seeding import derive_seed, generator
from localprop.settings.config import DataConfig
from places import SHARED

LARGE, SMALL = 120, 24
FLOWERS = SHARED / "data" / "flowers17.tar"


def write_folder(root: Path, side: int, train: int = 8, test: int = 3, form: str = "png") -> Path:
    """Two classes of noise images, `train` and `test` of each."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.{form}")
    return root


def folder(root: Path, img_size: int | None = 32, seed: int = 0, **settings) -> Data:
    return load_data(DataConfig(data=f"folder:{root}", **{"workers": 0} | settings), img_size, seed)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def equal(batches, others) -> bool:
    return all(
        torch.equal(a, b)
        for batch, other in zip(batches, others, strict=True)
        for a, b in zip(batch, other, strict=True)
    )


def error_of(call, *args, **kwargs) -> str:
    with pytest.raises(DataError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def large(tmp_path):
    return write_folder(tmp_path / "pets", LARGE)


@pytest.fixture
def small(tmp_path):
    return write_folder(tmp_path / "pets", SMALL)


def test_small_images_are_held_as_they_are(small):
    data = load_data(DataConfig(data=f"folder:{small}"), None, 0, default_img_size=224)
    assert isinstance(data.store, MemoryStore)
    assert (data.name, data.classes, data.img_size) == ("pets", ["cat", "dog"], 224)
    assert folder(small, img_size=None).img_size == SMALL, "where the model does not mind, they stay as they are"
    assert (data.train_size, data.test_size) == (16, 6)
    assert data.store.crop_pad == SMALL // 8
    assert data.store.train_labels.tolist() == [0] * 8 + [1] * 8
    pixels = np.asarray(Image.open(small / "train" / "dog" / "3.png")).transpose(2, 0, 1)
    assert np.array_equal(data.store.train_images[11].numpy(), pixels)
    assert next(data.test_batches(6, "cpu"))[0].shape == (6, 3, 224, 224)
    assert [folder(small, hold_on_device=hold).store.hold_on_device for hold in (False, True)] == [False, True]


def test_small_images_of_many_sizes_are_brought_to_one(small):
    Image.new("RGB", (30, 10), (10, 20, 30)).save(small / "train" / "cat" / "0.png")
    data = folder(small, img_size=40)
    assert data.store.train_images.shape == (16, 3, 40, 40)
    assert [tuple(image.shape) for image in data.store.test_images] == [(3, SMALL, SMALL)] * 6
    assert (data.store.train_images[0].flatten(1).float().mean(1) == torch.tensor([10.0, 20, 30])).all()
    assert folder(small, img_size=224).store.train_images.shape == (16, 3, 96, 96)
    note = f"images in {small} are of several sizes, or not square; they are squeezed to be square"
    assert data.notes == [note]


def test_validation_folder_hidden_files_and_grey_images(small):
    (small / "test").rename(small / "val")
    (small / "train" / ".ipynb_checkpoints").mkdir()
    (small / "train" / "cat" / "._0.png").write_bytes(b"left by a file manager")
    (small / "train" / "cat" / "notes.txt").write_text("not an image")
    Image.new("L", (SMALL, SMALL), 7).save(small / "train" / "cat" / "0.png")
    data = folder(small)
    assert (data.train_size, data.classes) == (16, ["cat", "dog"])
    assert (data.store.train_images[0] == 7).all()


def test_large_images_are_streamed(large):
    data = folder(large)
    assert isinstance(data.store, StreamStore)
    images, labels = next(data.train_batches(0, 16, "cpu"))
    assert (images.shape, images.dtype) == ((16, 3, 32, 32), torch.float32)
    assert sorted(labels.tolist()) == [0] * 8 + [1] * 8
    assert images.mean((0, 2, 3)).abs().max() < 1
    with pytest.raises(ConfigError, match=r"--crop-pad is for images up to 96 pixels"):
        folder(large, crop_pad=4)
    with pytest.raises(ConfigError, match=r"--hold-on-device is for images up to 96 pixels.*; leave it out$"):
        folder(large, hold_on_device=True)


def test_streamed_test_images_are_scaled_cropped_and_normalised_in_order(large):
    batches = list(folder(large).test_batches(4, "cpu"))
    assert [labels.tolist() for _, labels in batches] == [[0, 0, 0, 1], [1, 1]]
    with Image.open(large / "test" / "dog" / "0.png") as image:
        # timm evaluates on the central 87.5 %.
        pixels = np.asarray(image.resize((36, 36), Image.Resampling.BILINEAR))[2:34, 2:34] / 255
    reference = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert np.allclose(batches[0][0][3].permute(1, 2, 0), reference, atol=1e-4)


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_is_the_same_with_any_workers_after_any_restart(large, workers):
    (large / "train" / "cat" / "5.png").write_bytes(b"no image")
    whole = list(folder(large, mixup=0.5).train_batches(1, 2, "cpu"))
    assert [len(images) for images, _ in whole] == [2] * 8
    data = folder(large, mixup=0.5, workers=workers)
    torch.manual_seed(workers)
    assert equal(whole, data.train_batches(1, 2, "cpu"))
    assert data.skipped == [str(large / "train" / "cat" / "5.png")]
    assert equal(whole[5:], folder(large, mixup=0.5, workers=workers).train_batches(1, 2, "cpu", start=5))
    assert not equal(whole, folder(large, mixup=0.5).train_batches(2, 2, "cpu"))


def test_streaming_survives_the_way_to_spawned_workers(large, monkeypatch):
    """Starting one takes seconds of imports; what may fail is that it is sent everything by pickle."""

    def sent(loaded):
        return pickle.loads(ForkingPickler.dumps(loaded))

    def loader(images, collate_fn, **options):
        return DataLoader(sent(images), collate_fn=sent(collate_fn), **options)

    reference = list(folder(large).train_batches(0, 8, "cpu"))
    monkeypatch.setattr(streaming, "DataLoader", loader)
    assert equal(reference, folder(large).train_batches(0, 8, "cpu"))


def test_streaming_leaves_global_random_states_alone(large):
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    for workers in (0, 1):
        data = folder(large, workers=workers, mixup=1.0)
        next(data.train_batches(0, 8, "cpu"))
        next(data.test_batches(8, "cpu"))
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


def test_an_unreadable_image_is_replaced_by_the_next_of_the_epoch(large):
    def labels_of(data):
        return [label for _, labels in data.train_batches(0, 4, "cpu") for label in labels.tolist()]

    good, names = labels_of(folder(large)), sorted((large / "train").glob("*/*"))
    order = torch.randperm(16, generator=generator(derive_seed(0, "order", 0))).tolist()
    assert good == [index // 8 for index in order]
    position = next(i for i in range(15) if good[i] != good[i + 1])
    truncate(names[order[position]])
    assert labels_of(folder(large)) == [*good[:position], good[position + 1], *good[position + 1 :]]


@pytest.mark.parametrize("form", ["jpg", "png"])
@pytest.mark.parametrize("side", [SMALL, LARGE])
def test_damaged_training_images_are_skipped_up_to_a_limit(tmp_path, side, form):
    root = write_folder(tmp_path, side, form=form)
    damaged = [root / "train" / name / f"{number}.{form}" for name, number in (("cat", 2), ("dog", 0))]
    for path in damaged:
        truncate(path)
    data = folder(root, bad_images=2)
    assert [len(labels) for _, labels in data.train_batches(0, 7, "cpu")] == [7, 7]
    list(data.train_batches(1, 7, "cpu"))
    assert sorted(data.skipped) == [str(path) for path in damaged]
    assert data.train_size == (14 if side == SMALL else 16)

    def run():
        list(folder(root, bad_images=1).train_batches(0, 14, "cpu"))

    message = error_of(run)
    assert any(str(path) in message for path in damaged)
    assert "and 1 training images before it" in message
    assert "--bad-images" in message


@pytest.mark.parametrize("side", [SMALL, LARGE])
def test_a_damaged_test_image_ends_the_evaluation(tmp_path, side):
    root = write_folder(tmp_path, side, form="jpg")
    truncate(root / "test" / "cat" / "1.jpg")
    message = error_of(lambda: list(folder(root, bad_images=100).test_batches(4, "cpu")))
    assert str(root / "test" / "cat" / "1.jpg") in message
    assert "truncated" in message.lower()


def test_a_folder_of_nothing_but_damage(tmp_path, large):
    data = folder(large, bad_images=100)
    for path in large.glob("train/*/*"):
        truncate(path)
    assert "like all other training images" in error_of(lambda: list(data.train_batches(0, 4, "cpu")))
    small = write_folder(tmp_path / "small", SMALL)
    for path in small.glob("train/*/*"):
        path.write_bytes(b"")
    emptied = folder(small, bad_images=100)
    assert emptied.train_size == 0
    assert "fewer than one batch" in error_of(emptied.steps_per_epoch, 4)


def test_what_is_wrong_with_an_image_is_said(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    assert error_of(read_image, str(tmp_path / "text.png")).endswith("text.png is unreadable (not an image)")
    assert "No such file" in error_of(read_image, str(tmp_path / "gone.png"))


def test_sizes_are_those_of_all_images_until_one_is_large(tmp_path):
    files = []
    for number in range(70):
        files.append(File(str(tmp_path / f"{number:03}.png"), 0))
        Image.new("RGB", (20, 20 + number // 69)).save(files[-1].path)
    (tmp_path / "000.png").write_bytes(b"damaged")
    assert small_sizes(files) == {(20, 20), (20, 21)}
    Image.new("RGB", (97, 5)).save(files[68].path)
    assert small_sizes(files) is None


@pytest.mark.parametrize("part", ["train", "test"])
def test_one_large_image_among_small_ones_has_all_streamed(tmp_path, part):
    """With 100 training images every second header used to be looked at, and none of the test images."""
    root = write_folder(tmp_path / "pets", SMALL, train=50)
    assert isinstance(folder(root).store, MemoryStore)
    pixels = np.zeros((100, 200, 3), dtype=np.uint8)
    pixels[:, 40:160] = 255
    Image.fromarray(pixels).save(root / part / "dog" / "1.png")
    data = folder(root)
    assert isinstance(data.store, StreamStore)
    if part == "test":  # its middle is white; squeezed, its sides would be black
        shown = next(data.test_batches(6, "cpu"))[0][4]
        assert shown.min() > 1.5


def test_one_small_image_among_large_ones_is_seen_whole(tmp_path):
    root = write_folder(tmp_path / "pets", LARGE)
    Image.new("RGB", (10, 20), "white").save(root / "train" / "cat" / "0.png")
    data = folder(root)
    assert isinstance(data.store, StreamStore)
    (batch,) = data.train_batches(0, 16, "cpu")
    assert (batch[0].flatten(1).amin(1) > 1.5).sum() == 1


def test_wrong_folders_are_named_with_a_remedy(tmp_path, small):
    assert f"{tmp_path / 'none'} is not a folder" in error_of(folder, tmp_path / "none")
    assert f"{tmp_path} has no folder train/" in error_of(folder, tmp_path)
    (small / "test").rename(small / "elsewhere")
    assert f"{small} has no folder test/ or val/" in error_of(folder, small)
    (small / "elsewhere").rename(small / "val")
    (small / "train" / "emu").mkdir()
    assert f"no images in {small / 'train' / 'emu'}" in error_of(folder, small)
    (small / "val" / "fox").mkdir()
    message = error_of(folder, small)
    assert f"{small / 'val'} has folders of classes that are not trained on: 'fox'" in message
    (small / "val" / "fox").rmdir()
    for name in ("cat", "dog", "emu"):
        (small / "train" / name).rename(small / name)
    assert "has 0 class folders" in error_of(folder, small)


@pytest.mark.skipif(not FLOWERS.is_file(), reason="the photographs of flowers17 are not in ../shared/data")
def test_real_photographs(tmp_path):
    with tarfile.open(FLOWERS) as archive:
        chosen = [member for member in archive.getmembers() if member.name.endswith("0.jpg")]
        archive.extractall(tmp_path, chosen, filter="data")
    data = folder(tmp_path / "flowers17", img_size=64)
    assert len(data.classes) == 17
    assert (data.classes[0], data.classes[-1]) == ("01_daffodil", "17_pansy")
    assert data.train_size + data.test_size == len(chosen)
    assert isinstance(data.store, StreamStore)
    images, _ = next(data.train_batches(0, 32, "cpu"))
    assert images.shape == (32, 3, 64, 64)
    assert 0.3 < images.std() < 2
    assert sum(len(labels) for _, labels in data.test_batches(16, "cpu")) == data.test_size
