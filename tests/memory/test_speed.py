"""The time that operations are expected to take, on machines with round numbers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from localprop.memory.recompute import recomputing
from localprop.memory.speed import MACHINES, Clock, Host, Machine, Products
from localprop.memory.tracker import Tracker

PRODUCTS = Products(large=1e6, batched=1e5, convolution=2e5, attention=5e5)
HALF = Products(large=4e6, batched=4e5, convolution=8e5, attention=2e6)
FREE = Host(forward=0.0, backward=0.0, hooked=0.0, again=0.0, given=0.0)
RATES = Path(__file__).parents[2] / "benchmarks" / "results" / "rates_cpu.json"
DEVICE = Machine(PRODUCTS, HALF, bandwidth=1e5, kernel=0.0, host=FREE, cuda=True, link=1.0, host_link=1.0)


def counted(machine, run):
    with FakeTensorMode(), Tracker(machine) as tracker:
        run()
    return tracker


def kernels(run, **changed):
    return counted(replace(DEVICE, **changed), run).clock.busy


def test_products_take_the_time_of_their_kind_and_precision():
    def of(call, *shapes, dtype=torch.float32):
        return kernels(lambda: call(*(torch.empty(shape, dtype=dtype) for shape in shapes)), bandwidth=1e12)

    assert of(torch.mm, (100, 50), (50, 20)) == pytest.approx(2 * 100 * 50 * 20 / 1e6, rel=1e-4)
    assert of(torch.mm, (100, 50), (50, 20), dtype=torch.bfloat16) == pytest.approx(0.05, rel=1e-4)
    assert of(torch.bmm, (4, 10, 5), (4, 5, 10)) == pytest.approx(2 * 4 * 10 * 5 * 10 / 1e5, rel=1e-4)
    assert of(torch.conv2d, (1, 3, 8, 8), (5, 3, 1, 1)) == pytest.approx(2 * 64 * 3 * 5 / 2e5, rel=1e-4)


def test_the_attention_of_a_cpu_counts_its_products():
    shape = (2, 3, 16, 8)
    tensors = [torch.empty(shape, requires_grad=True) for _ in range(3)]

    def run():
        nn.functional.scaled_dot_product_attention(*(tensor * 1 for tensor in tensors)).sum().backward()

    with FakeTensorMode(allow_non_fake_inputs=True), Tracker(DEVICE) as tracker:
        run()
    # Two products of forward; one of them again in backward, and four gradients.
    assert tracker.flops == 7 * 2 * 2 * 3 * 16 * 16 * 8


def test_the_rates_of_a_cpu_are_those_that_were_measured():
    """By `benchmarks/rates.py`, to two digits."""
    measured, cpu = json.loads(RATES.read_text())["rates"], MACHINES["cpu"]
    assert {"bandwidth", "single.large", "single.batched", "half.large"} <= measured.keys()
    for name, rate in measured.items():
        known = cpu.bandwidth if name == "bandwidth" else cpu.rate(*name.split("."))
        assert known == pytest.approx(rate, rel=0.03), name


def test_whatever_else_takes_as_long_as_its_bytes_move_and_nothing_is_shorter_than_a_kernel():
    def add():
        torch.empty(1000) + torch.empty(1000)

    assert kernels(add) == pytest.approx(3 * 4000 / 1e5)
    assert kernels(add, kernel=2.0) == pytest.approx(2.12)  # neither does `empty` launch one
    assert kernels(lambda: torch.empty(1000).view(10, 100).t()) == 0


def clock(cuda, *operations):
    """The seconds of additions that the host calls within `host` seconds each, and whose kernels take so long."""
    found = None
    for host, kernel in operations:
        own = replace(DEVICE, kernel=kernel, bandwidth=1e30, host=replace(FREE, forward=host), cuda=cuda)
        found = found or Clock(own)
        found.machine = own
        found.count(torch.ops.aten.add.Tensor, [], 0, 0)
    return found


def test_a_gpu_waits_for_launches_only_where_it_is_not_behind():
    assert clock(True, (1, 5), (1, 5), (1, 5)).seconds == 1 + 15
    assert clock(True, (5, 1), (5, 1), (5, 1)).seconds == 15 + 1
    assert clock(True, (1, 9), (1, 1), (1, 1)).seconds == 1 + 11  # the host has run ahead
    assert clock(True, (1, 1), (1, 1), (1, 9)).seconds == 3 + 9
    assert clock(True, (5, 1), (5, 1), (5, 1)).busy == 3


def test_a_cpu_does_one_after_the_other():
    assert clock(False, (1, 5), (1, 5)).seconds == 12


def host_seconds(run, **costs):
    """What the host needs of a machine whose kernels take no time."""
    machine = replace(DEVICE, bandwidth=1e30, single=Products(*[1e30] * 4), host=replace(FREE, **costs))
    return round(counted(machine, run).seconds, 6)


def step(again=False, cheap=False):
    net = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    x = torch.empty(2, 4, requires_grad=True)
    with recomputing(cheap):
        output = checkpoint(net, x, use_reentrant=False) if again else net(x)
    torch.autograd.backward(output, torch.empty(2, 4))


def test_the_host_calls_operations_from_python_and_from_autograd():
    forward, backward = (host_seconds(step, **{name: 1.0}) for name in ("forward", "backward"))
    assert forward >= 3 + 4  # weights are drawn, too
    assert backward >= 5
    assert host_seconds(step, forward=1.0, backward=1.0) == forward + backward


def test_python_that_runs_again_in_backward_is_called_as_in_forward():
    assert host_seconds(step, again=1.0) == 0
    assert host_seconds(lambda: step(again=True), again=1.0) == 1
    more = host_seconds(lambda: step(again=True), forward=1.0) - host_seconds(step, forward=1.0)
    assert 2 <= more <= 3  # all but the last, of which backward needs nothing


def test_hooks_on_what_autograd_keeps_cost_time_in_python():
    assert host_seconds(step, hooked=1.0) == 0
    assert host_seconds(lambda: step(cheap=True), hooked=1.0) == 3
    # Once in forward, and again when it is repeated.
    assert 5 <= host_seconds(lambda: step(again=True), hooked=1.0) <= 6


def test_an_operation_on_a_list_is_one_launch_of_many_tensors():
    def update(count):
        return lambda: torch._foreach_add_([torch.empty(3) for _ in range(count)], 1.0)

    assert host_seconds(update(1), forward=1.0) == host_seconds(update(10), forward=1.0) == 1
    assert host_seconds(update(10), given=1.0) == 10
