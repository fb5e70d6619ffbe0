"""Remembered results of operations on fake tensors are those that PyTorch gives."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from localprop.memory import tracker
from localprop.memory.remembered import remember
from localprop.memory.tracker import Tracker
from localprop.planning.simulation import record_step
from localprop.settings.config import OptimConfig
from tiny import SIZE, split


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(tracker, "_known", {})


@pytest.mark.parametrize(
    ("name", "method", "device", "settings"),
    [
        ("swin", "greedy", "cpu", {"amp": True}),
        ("mlp", "greedy", "cuda", {"opt": "lion", "micro_batches": 2}),
        ("cnn", "feature-reconstruction", "cpu", {"clip_grad": 1.0}),
    ],
)
def test_a_step_is_seen_as_without_them(monkeypatch, name, method, device, settings):
    """Each allocation and each free, and the time before it: at first, and when all is known.

    Casts of weights are freed at one moment, in the order of their addresses.
    """

    def seen():
        record = record_step(split(name, 2, method), OptimConfig(**settings), 8, SIZE, device)
        moments = itertools.groupby(record.tracker.events, lambda event: (event.seconds, event.change < 0))
        events = [(moment, sorted(event.change for event in own)) for moment, own in moments]
        return events, record.tracker.flops, record.marks

    first, again = seen(), seen()
    assert len(tracker._known) > 50
    monkeypatch.setattr(tracker, "call_of", lambda *_: None)
    monkeypatch.setattr(tracker, "device_of", lambda _: None)
    assert first == again == seen()


def looks(value):
    if isinstance(value, (tuple, list)):
        return [looks(item) for item in value]
    own = value.shape, value.stride(), value.storage_offset(), value.untyped_storage().nbytes()
    return *own, value.dtype, value.device, value.requires_grad, value.is_conj()


OPERATIONS = {
    "numbers of other types": (lambda x: [x.int() + 1, x.int() + True, x.int() + 1.0, x.bool() + 1, x.bool() + True]),
    "types by default": (lambda x: x.int() / 2),
    "strides": (lambda x: [x + 1, x.mT + 1, x[:, ::2] + 1, x.mT.contiguous(), x.expand(2, 3, 4).sum(0)]),
    "parts of its memory": (lambda x: [x[1:].clone(), x[1:].view(-1)[1:], *x.split(2, 1), *x.unbind(1)]),
    "sizes in lists": (lambda x: [x.new_zeros([3]), x.new_zeros([1, 3]), x.reshape(2, 6), x.reshape(6, 2)]),
    "conjugation": (lambda x: [torch.complex(x, x).conj() * 1, torch.complex(x, x) * 1]),
    "several": (lambda x: torch.nn.functional.layer_norm(x, (4,)).max(1)),
    "nothing in a place": (lambda x: list(torch.ops.aten.convolution_backward(
        x.view(1, 3, 4, 1), x.view(1, 3, 4, 1), x.new_zeros(3, 3, 1, 1), [3],
        [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False],
    ))[1:2]),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_result_looks_as_pytorchs_own(name):
    operation, mode = OPERATIONS[name], FakeTensorMode()
    with mode:
        expected = looks(operation(torch.empty(3, 4)))
        for _ in range(2):
            with Tracker():
                x = torch.empty(3, 4)
                result = operation(x)
            assert looks(result) == expected


def test_what_shares_memory_still_does():
    with FakeTensorMode(), Tracker():
        for _ in range(2):
            x = torch.empty(3, 4)
            parts = [x.view(12), x[1], *x.split(2, 1), x.detach()]
            assert {part.untyped_storage()._cdata for part in parts} == {x.untyped_storage()._cdata}
            assert x.add_(1) is x
            assert torch.add(x, 1, out=(out := torch.empty(3, 4))) is out
            assert (x + 1).untyped_storage()._cdata != x.untyped_storage()._cdata


def test_two_arguments_that_are_one_say_nothing_of_others():
    with FakeTensorMode():
        x = torch.empty(3)
        (output,) = remember(torch.ops.aten.add.out, (x, x), {"out": x}, [x, x, x]).outputs
    assert output.same == 2


def test_a_default_type_is_asked_for_each_time():
    with FakeTensorMode(), Tracker():
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            try:
                assert (torch.empty(3, dtype=torch.int) / 2).dtype == dtype
            finally:
                torch.set_default_dtype(torch.float32)


def test_a_result_is_of_the_mode_of_its_inputs():
    for _ in range(2):
        with FakeTensorMode() as mode, Tracker():
            assert (torch.empty(3) + 1).fake_mode is mode


def test_numbers_and_real_tensors_are_not_remembered():
    real = torch.ones(3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, one = torch.empty(3), torch.tensor(1.0)
        with Tracker():
            for first, second in ((one, one), (x, one), (x, real)):
                assert isinstance(first + second, FakeTensor)
    assert not tracker._known


def test_no_more_is_remembered_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(tracker, "_MOST", 3)
    with FakeTensorMode(), Tracker():
        for size in range(1, 9):
            torch.empty(size) + 1
            assert len(tracker._known) <= 3
