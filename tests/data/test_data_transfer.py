"""Batches that a thread prefetches, which ends when no more are wanted; and copies without a wait."""

import threading
from contextlib import closing

import pytest
import torch

from localprop.data.images.augment import random_crop
from localprop.data.images.memory import MemoryStore
from localprop.data.loading import load_data
from localprop.data.transfer import on_device, prefetch
from localprop.seeding import generator
from localprop.settings.config import DataConfig

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def threads() -> int:
    return sum(thread.name.startswith("ThreadPool") and thread.is_alive() for thread in threading.enumerate())


def numbers(made, count=10, broken=None):
    try:
        for number in range(count):
            if number == broken:
                raise ValueError("broken")
            made.append(number)
            yield number
    finally:
        made.append("closed")


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10])
def test_all_items_come_in_order_and_then_the_thread_ends(count):
    made = []
    assert list(prefetch(numbers(made, count))) == list(range(count))
    assert made == [*range(count), "closed"]
    assert threads() == 0


@pytest.mark.parametrize("most", [1, 2, 4])
def test_no_more_are_prefetched_than_asked_for(most):
    made, asked = [], threading.Semaphore(0)

    def items():
        for number in numbers(made):
            asked.release()
            yield number

    with closing(prefetch(items(), most)) as batches:
        for number in range(3):
            assert next(batches) == number
        for _ in range(3 + most):
            assert asked.acquire(timeout=30)
        assert not asked.acquire(timeout=0.05)
        assert made == list(range(3 + most))
    assert made[-1] == "closed"
    assert threads() == 0


def test_an_error_comes_in_the_place_of_its_item():
    batches = prefetch(numbers([], broken=4))
    assert [next(batches) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="broken"):
        next(batches)
    assert threads() == 0


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_a_closed_prefetch_leaves_no_thread(taken):
    batches = prefetch(numbers([]))
    for _ in range(taken):
        next(batches)
    batches.close()
    assert threads() == 0


@pytest.mark.parametrize("settings", [{}, {"mixup": 0.8}, {"cutmix": 1.0, "hflip": 0.5, "crop_pad": 3}])
def test_prefetched_batches_are_the_same_bit_for_bit(settings, monkeypatch):
    def batches():
        data = load_data(DataConfig(**settings), 12, 0)
        return [*data.train_batches(1, 64, "cpu", start=2), *data.test_batches(50, "cpu")]

    plain = batches()
    monkeypatch.setattr(MemoryStore, "_prefetched", lambda self, made, device: prefetch(made))
    for ours, theirs in zip(plain, batches(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert threads() == 0


def test_batches_for_a_device_are_prefetched_by_a_thread_that_ends_with_them():
    batches = load_data(DataConfig(), None, 0).train_batches(0, 64, "meta")
    next(batches)
    assert threads() == 1
    batches.close()
    assert threads() == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64])
@pytest.mark.parametrize("size", [(5, 7), (8, 8)])
def test_crops_are_the_windows_that_the_generator_draws(dtype, size):
    images = torch.randint(256, (64, 3, *size)).to(dtype)
    top, left = torch.randint(7, (2, 64), generator=generator(0))
    padded = torch.nn.functional.pad(images, (3, 3, 3, 3))
    rows = zip(padded, top.tolist(), left.tolist(), strict=True)
    expected = torch.stack([image[:, t : t + size[0], x : x + size[1]] for image, t, x in rows])
    found = random_crop(images, 3, generator(0))
    assert torch.equal(found, expected)
    assert found.is_contiguous()


@pytest.fixture
def no_wait():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("img_size", [16, 24])
@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("mix", [{}, {"mixup": 0.8}, {"cutmix": 1.0}])
def test_batches_come_to_a_gpu_without_a_wait(hold, mix, img_size, request):
    data = load_data(DataConfig(crop_pad=2, hflip=0.5, hold_on_device=hold, **mix), img_size, 0)
    batches = data.train_batches(0, 64, "cuda")
    next(batches)  # images that are held move now
    request.getfixturevalue("no_wait")
    for _ in range(5):
        images, labels = next(batches)
        assert images.is_cuda
        assert labels.is_cuda
    batches.close()


@pytest.mark.gpu
@GPU
def test_pinned_memory_is_used_again_only_when_the_copy_is_over():
    device = torch.device("cuda")
    busy = torch.randn(4096, 4096, device=device)
    copies = []
    for number in range(50):
        busy = busy @ busy  # so that copies queue up
        copies.append(on_device(torch.full((1 << 20,), number, dtype=torch.uint8), device))
    assert [copy.unique().tolist() for copy in copies] == [[number] for number in range(50)]
