"""Measuring memory: known allocations, shared memory, and errors that mean there is no more."""

import pytest
import torch

from localprop.memory.measure import (
    allocated_changes,
    available,
    is_out_of_memory,
    measured,
    plain_tensors,
    total_bytes,
)

CPU = torch.device("cpu")
SIZE = 1 << 20


def block(count=1):
    return torch.ones(count * SIZE, dtype=torch.uint8)


def test_the_peak_is_what_was_in_use_at_once():
    held = block(3)
    with measured([held], CPU) as measurement:
        a = block(5)
        del a
        b, c = block(2), block(4)
        del b, c
        a = block()
    assert measurement.peak == 9 * SIZE
    assert len(a) == SIZE
    with measured([held], CPU) as measurement:
        pass
    assert measurement.peak == 3 * SIZE


def test_a_measurement_may_follow_another():
    peaks = []
    for count in (4, 1):
        with measured([], CPU) as measurement:
            block(count)
        peaks.append(measurement.peak)
    assert peaks == [4 * SIZE, SIZE]


def test_garbage_of_before_is_not_freed_inside():
    with measured([], CPU):
        cycle = [block(8)]
        cycle.append(cycle)
        del cycle
    with measured([], CPU) as measurement:
        for _ in range(3000):  # enough new objects for a collection
            [].append({})
        rubbish = [[[]] for _ in range(3000)]
        block()
    assert measurement.peak == SIZE
    assert rubbish


def test_changes_are_in_order():
    changes, result = allocated_changes(lambda: block(2)[: block(1)[0]])
    assert changes[:2] == [2 * SIZE, SIZE]
    assert sum(changes) >= 2 * SIZE
    assert len(result) == 1


def test_shared_memory_counts_once():
    tensor = torch.zeros(4, 8)
    assert total_bytes([tensor, tensor[1:], tensor.T, torch.zeros(2)]) == 128 + 8


def test_tensors_are_found_wherever_they_are():
    a, b = torch.zeros(1), torch.zeros(2)
    assert [id(t) for t in plain_tensors([{"x": a, "y": [b, 3]}, (a,), None])] == [id(a), id(b), id(a)]


def test_of_a_quantized_moment_the_tensors_that_it_is_made_of_are_found():
    low_bit = pytest.importorskip("torchao.optim.subclass_8bit", exc_type=ImportError)
    moment = low_bit.OptimState8bit.zeros((4096,), block_size=256, device="cpu")
    assert total_bytes(plain_tensors([moment])) >= 4096 + 4 * 16
    assert all(type(tensor) is torch.Tensor for tensor in plain_tensors([moment]))


def test_there_is_memory():
    assert SIZE < available(CPU) < 1 << 60


def test_what_it_means_that_there_is_no_more():
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as error:
        torch.ones(2) @ torch.ones(3)
    assert not is_out_of_memory(error.value)


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [("1000\n", "400\n", 600), ("max\n", "400\n", 2048), (None, None, 2048), ("1000000", "1", 2048)],
)
def test_what_is_available_is_the_least_of_the_systems_limits(limit, used, expected, monkeypatch):
    files = {"/sys/fs/cgroup/memory.max": limit, "/sys/fs/cgroup/memory.current": used}
    files["/proc/meminfo"] = "MemTotal: 9 kB\nMemAvailable:       2 kB\n"

    def read_text(path):
        if files.get(str(path)) is None:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr("pathlib.Path.read_text", read_text)
    assert available(CPU) == expected
    del files["/proc/meminfo"], files["/sys/fs/cgroup/memory.max"]
    assert available(CPU) is None
