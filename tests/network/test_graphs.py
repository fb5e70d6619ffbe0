"""A capture that fails leaves PyTorch in order. A stand-in for `torch.cuda` shows this without a GPU."""

import gc
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from localprop.network.graphs import CudaGraphPool

CUDA = torch.device("cuda", 0)


class Cuda:
    """Stands for `torch.cuda`: streams, a capture, and an allocator that counts what is begun and not ended."""

    def __init__(self, breaks):
        self.breaks = breaks  # whether an error inside breaks the capture, as waiting for the device does
        self.current, self.modes = "default", []
        self.begun, self.users, self.pools, self.resets = [], {}, 0, 0
        self.errors, self.kept = [], []

    def install(self, monkeypatch):
        stream = SimpleNamespace(device=CUDA)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(reset=self.reset, replay=self.replay))
        for name in ("graph", "stream", "graph_pool_handle"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self.release, raising=False)
        monkeypatch.setattr(torch, "zeros", lambda *size, device: None)

    def graph_pool_handle(self):
        self.pools += 1
        return (0, self.pools)

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, "side"
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph, pool="own", stream=None, capture_error_mode="global"):
        self.modes.append(capture_error_mode)
        own, before = self.stream(stream), len(self.errors)
        own.__enter__()
        assert pool not in self.begun
        self.begun.append(pool)
        self.users[pool] = self.users.get(pool, 0) + 1
        yield
        if self.breaks and len(self.errors) > before:
            self.kept.append(own)
            raise RuntimeError("operation failed due to a previous error during capture")  # and the stream stays
        self.begun.remove(pool)
        own.__exit__(None, None, None)
        graph.pool = pool

    def end(self, device, pool):
        if pool not in self.begun:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.begun.remove(pool)

    def release(self, device, pool):
        self.users[pool] -= 1

    def reset(self):
        self.resets += 1

    def replay(self):
        pass


@pytest.fixture(params=[True, False])
def cuda(request, monkeypatch):
    cuda = Cuda(request.param)
    cuda.install(monkeypatch)
    return cuda


def failing(cuda):
    def work():
        cuda.errors.append("waits")
        raise RuntimeError("operation not permitted when stream is capturing")

    return work


def test_after_a_failed_capture_the_caller_has_its_stream_and_nothing_stays_open(cuda):
    pool = CudaGraphPool(CUDA)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        pool.capture(failing(cuda))
    assert cuda.current == "default"
    assert cuda.begun == []
    assert cuda.resets == 1
    # A capture that has ended gives its part of the pool back when it is reset.
    assert cuda.users[(0, 1)] == (0 if cuda.breaks else 1)
    assert set(cuda.modes) == {"thread_local"}  # also of the capture that recovers: other threads load data meanwhile


def test_another_capture_can_follow_a_failed_one(cuda):
    pool = CudaGraphPool(CUDA)
    with pytest.raises(RuntimeError):
        pool.capture(failing(cuda))
    assert pool.capture(lambda: None) == cuda.replay
    assert cuda.users[(0, 2)] == 1


def test_what_a_failed_capture_made_is_freed_at_once(cuda):
    made = []

    def work():
        tensor = torch.ones(3)
        made.append(weakref.ref(tensor))
        failing(cuda)()

    gc.collect()
    gc.disable()
    try:
        with pytest.raises(RuntimeError):
            CudaGraphPool(CUDA).capture(work)
        assert made[0]() is None
    finally:
        gc.enable()


def test_a_warm_up_that_fails_still_joins_the_streams(monkeypatch):
    waits = []
    side = SimpleNamespace(device=CUDA, wait_stream=lambda other: waits.append(("side", other)))
    default = SimpleNamespace(wait_stream=lambda other: waits.append((other, "default")))
    cuda = Cuda(False)
    cuda.install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: default)
    with pytest.raises(ValueError, match="broken"), CudaGraphPool(CUDA).warm_up():
        raise ValueError("broken")
    assert waits == [("side", default), (side, "default")]
    assert cuda.current == "default"
