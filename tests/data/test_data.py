"""What the trainer sees of a dataset, on scikit-learn's digits."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits

from localprop.data.base import Data
from localprop.data.images.augment import random_crop, random_hflip, resize
from localprop.data.loading import load_data
from localprop.errors import ConfigError, DataError
from localprop.seeding import derive_seed, generator, seeded
from localprop.settings.config import DataConfig


def digits(img_size: int | None = None, seed: int = 0, **settings) -> Data:
    return load_data(DataConfig(**settings), img_size, seed)


def equal(batches, others) -> bool:
    return all(
        torch.equal(a, b)
        for batch, other in zip(batches, others, strict=True)
        for a, b in zip(batch, other, strict=True)
    )


def test_digits_are_split_once_and_for_all():
    data = digits(seed=1)
    assert (data.name, data.img_size, data.num_classes) == ("digits", 16, 10)
    assert data.classes == [str(digit) for digit in range(10)]
    assert (data.train_size, data.test_size, data.steps_per_epoch(32)) == (1437, 360, 44)
    other = digits(seed=2)
    assert torch.equal(data.store.train_images, other.store.train_images)
    together = torch.cat([data.store.train_images, data.store.test_images])[:, 0].double() * 16 / 255
    original = load_digits().images.reshape(-1, 64)
    assert sorted(map(tuple, together.round().flatten(1).tolist())) == sorted(map(tuple, original.tolist()))
    counts = torch.bincount(data.store.test_labels)
    assert counts.min() >= 34
    assert counts.max() <= 38


def test_digits_are_normalised_with_their_own_statistics():
    data = digits()
    pixels = data.store.train_images.double() / 255
    assert data.mean == pytest.approx([pixels.mean().item()] * 3, abs=1e-4)
    assert data.std == pytest.approx([pixels.std().item()] * 3, abs=1e-4)


def test_test_batches_are_all_images_in_order():
    data = digits()
    batches = list(data.test_batches(100, "cpu"))
    assert [len(labels) for _, labels in batches] == [100, 100, 100, 60]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert torch.equal(labels, data.store.test_labels)
    originals = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in data.store.test_images]
    resized = np.stack([np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR)) for image in originals])
    reference = (torch.from_numpy(resized).permute(0, 3, 1, 2).double() / 255 - data.mean[0]) / data.std[0]
    torch.testing.assert_close(images.double(), reference, atol=1e-5, rtol=0)


def test_an_epoch_shows_each_image_once():
    data = digits(img_size=8, crop_pad=0)
    known = {tuple(image.flatten().tolist()): label for image, label in _originals(data)}
    seen = []
    for images, labels in data.train_batches(3, 32, "cpu"):
        assert images.shape == (32, 3, 8, 8)
        pixels = (images * data.std[0] + data.mean[0]).mul(255).round().long()
        keys = [tuple(image.flatten().tolist()) for image in pixels]
        assert [known[key] for key in keys] == labels.tolist()
        seen += keys
    assert len(seen) == len(set(seen)) == 44 * 32


def _originals(data: Data):
    return zip(data.store.train_images.long(), data.store.train_labels.tolist(), strict=True)


MIXING = [{}, {"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}]


@pytest.mark.parametrize("settings", MIXING)
def test_restart_in_mid_epoch_changes_nothing(settings):
    whole = list(digits(hflip=0.5, **settings).train_batches(2, 64, "cpu"))
    assert len(whole) == 22
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    rest = list(digits(hflip=0.5, **settings).train_batches(2, 64, "cpu", start=7))
    assert equal(whole[7:], rest)
    assert list(digits(**settings).train_batches(2, 64, "cpu", start=22)) == []


@pytest.mark.parametrize(("seed", "epoch"), [(1, 0), (0, 1), (2**32, 0)])
def test_other_seeds_and_epochs_give_other_batches(seed, epoch):
    first = next(digits(seed=0).train_batches(0, 64, "cpu"))
    assert not torch.equal(first[0], next(digits(seed=seed).train_batches(epoch, 64, "cpu"))[0])


def test_negative_and_huge_seeds_are_seeds():
    assert len({derive_seed(seed, "order", 0) for seed in (-1, 0, 1, 2**40, 2**63)}) == 5


def test_purposes_and_places_do_not_share_seeds():
    seeds = [derive_seed(0, purpose, a, b) for purpose in ("crop", "mix") for a in range(9) for b in range(9)]
    assert len(set(seeds)) == len(seeds)


def test_global_random_states_are_left_alone():
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    list(digits(mixup=0.8, cutmix=1.0).train_batches(0, 64, "cpu"))
    with seeded(3):
        drawn = random.random(), np.random.rand(), torch.rand(1)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    with seeded(3):
        assert (random.random(), np.random.rand(), torch.rand(1)) == drawn


def test_crop_cuts_each_image_at_its_own_place():
    images = torch.randint(1, 256, (400, 3, 6, 6), dtype=torch.uint8)
    cropped = random_crop(images, 2, generator(0))
    assert cropped.dtype == torch.uint8
    places = set()
    for image, crop in zip(images.numpy(), cropped.numpy(), strict=True):
        padded = np.pad(image, ((0, 0), (2, 2), (2, 2)))
        found = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if np.array_equal(padded[:, top : top + 6, left : left + 6], crop)
        ]
        assert len(found) == 1
        places.add(found[0])
    assert len(places) == 25


def test_flip_mirrors_its_share_of_images():
    images = torch.arange(1000 * 3 * 2 * 4).view(1000, 3, 2, 4)
    flipped = random_hflip(images, 0.25, generator(0))
    mirrored = (flipped == torch.from_numpy(images.numpy()[..., ::-1].copy())).all((1, 2, 3))
    untouched = (flipped == images).all((1, 2, 3))
    assert (mirrored ^ untouched).all()
    assert 200 < mirrored.sum() < 300


def test_resize_shrinks_without_aliasing():
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(16).expand(1, 3, 32, 32)
    assert resize(stripes, 8)[..., 1:-1].sub(127.5).abs().max() < 1
    assert resize(stripes, 32) is stripes


def test_mixup_mixes_with_the_mirrored_batch():
    plain = list(digits().train_batches(0, 64, "cpu"))
    mixed = list(digits(mixup=0.8, smoothing=0.2).train_batches(0, 64, "cpu"))
    shares = set()
    for (images, labels), (blends, targets) in zip(plain, mixed, strict=True):
        one_hot = F.one_hot(labels, 10) * 0.8 + 0.02
        pairs = labels != labels.flip(0)
        difference = (one_hot - one_hot.flip(0))[pairs]
        share = ((targets - one_hot.flip(0))[pairs] * difference).sum() / difference.square().sum()
        torch.testing.assert_close(targets, one_hot * share + one_hot.flip(0) * (1 - share))
        torch.testing.assert_close(blends, images * share + images.flip(0) * (1 - share), atol=1e-5, rtol=0)
        shares.add(round(share.item(), 4))
    assert len(shares) > 15


def test_labels_stay_whole_without_mixing():
    assert next(digits(smoothing=0.3).train_batches(0, 32, "cpu"))[1].dtype == torch.int64


def test_defaults_of_crop_and_flip():
    assert (digits().store.crop_pad, digits().store.hflip) == (0, 0)
    store = digits(crop_pad=3, hflip=0.2).store
    assert (store.crop_pad, store.hflip) == (3, 0.2)


@pytest.mark.parametrize(
    ("settings", "batch_size", "error", "words"),
    [
        ({"mixup": 0.1}, 33, ConfigError, "--batch-size is 33"),
        ({"cutmix": 0.1}, 33, ConfigError, "even"),
        ({}, 1438, DataError, "digits has 1437 training images, fewer than one batch of 1438"),
    ],
)
def test_impossible_batches_are_refused_at_once(settings, batch_size, error, words):
    data = digits(**settings)
    with pytest.raises(error, match=words):
        data.train_batches(0, batch_size, "cpu")
    with pytest.raises(error, match=words):
        data.steps_per_epoch(batch_size)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data": "cifar"}, "did you mean 'cifar10"),
        ({"data": "imagenet"}, "no dataset is called 'imagenet'"),
        ({"data": "."}, "did you mean 'folder:.'"),
        ({"data": "folder:"}, "write folder:PATH"),
        ({"hflip": 1.5}, "--hflip is 1.5"),
        ({"crop_pad": -1}, "--crop-pad is -1; it must be at least 0"),
        ({"crop_pad": 8}, "--crop-pad is 8"),
    ],
)
def test_mistaken_settings(settings, words):
    with pytest.raises(ConfigError, match=words) as caught:
        digits(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_images_held_on_the_device_give_the_same_batches(name):
    ours, theirs = (digits(data=name, hflip=0.5, crop_pad=2, hold_on_device=hold) for hold in (True, False))
    for epoch in (0, 1):
        assert equal(ours.train_batches(epoch, 64, "cpu", start=3), theirs.train_batches(epoch, 64, "cpu", start=3))
        assert equal(ours.test_batches(50, "cpu"), theirs.test_batches(50, "cpu"))


def test_images_move_to_the_device_when_asked_and_not_before():
    for hold in (True, False):
        data = digits(img_size=8, hold_on_device=hold)
        assert data.store.train_images.device.type == "cpu"
        images, labels = next(data.test_batches(50, "meta"))
        assert {images.device.type, labels.device.type} == {"meta"}
        store = data.store
        held = [store.train_images, store.train_labels, store.test_images, store.test_labels]
        assert {tensor.device.type for tensor in held} == {"meta" if hold else "cpu"}
        assert store.train_images.dtype == torch.uint8
        assert next(data.train_batches(0, 32, "meta"))[0].shape == (32, 3, 8, 8)
    data = digits(hold_on_device=True)
    next(data.test_batches(50, "meta"))
    assert data.store.test_images.device.type == "cpu", "each evaluation resizes them there"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_images_held_on_a_gpu_give_the_same_batches():
    ours, theirs = (digits(48, data="synthetic", mixup=0.8, hold_on_device=hold) for hold in (True, False))
    before = torch.cuda.memory_allocated()
    next(ours.train_batches(0, 64, "cuda"))
    images = ours.store.train_images
    assert images.is_cuda
    assert torch.cuda.memory_allocated() - before >= 1024 * 3 * 32 * 32
    for epoch in (0, 1):
        assert equal(ours.train_batches(epoch, 64, "cuda"), theirs.train_batches(epoch, 64, "cuda"))
        assert equal(ours.test_batches(50, "cuda"), theirs.test_batches(50, "cuda"))
    assert ours.store.train_images is images, "moved more than once"
    assert not theirs.store.train_images.is_cuda


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu_equal_those_on_the_cpu():
    ours, theirs = (list(digits(mixup=0.8).train_batches(0, 64, device)) for device in ("cpu", "cuda"))
    for (images, labels), (gpu_images, gpu_labels) in zip(ours, theirs, strict=True):
        assert gpu_images.is_cuda
        torch.testing.assert_close(images, gpu_images.cpu(), atol=1e-4, rtol=0)
        torch.testing.assert_close(labels, gpu_labels.cpu())
