"""Boundaries that rest on the host: training does not notice, and none is on the device while others are at work."""

from dataclasses import replace

import pytest
import torch

from checkpoint_states import bits
from localprop.cli import main
from localprop.network.resting import OnHost
from localprop.settings.config import OptimConfig
from localprop.training.state import TrainingState
from tiny import batch, split

CONFIG = OptimConfig(epochs=4, lr=1e-2, sched="cosine", warmup_epochs=0, clip_grad=1.0)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def training(name, away, device="cpu", freeze=0, **changes):
    net = split(name, 3, "end-to-end", freeze_modules=freeze).to(device)
    state = TrainingState(net.train(), replace(CONFIG, **changes), 10, torch.device(device))
    if device == "cpu":  # beside a CPU the host is another place in the same memory
        state.away = OnHost if away else None
    assert (state.away is not None) == away
    return state


def steps(state, count=3, device="cpu"):
    losses = []
    for _ in range(count):
        parts = state.config.micro_batches
        for part in range(parts):
            with torch.autocast(device, torch.bfloat16, enabled=state.config.amp):
                own = [tensor.to(device) for tensor in batch(seed=part)]
                losses.append(state.train_step(own, seed=state.step + 10 * part, last=part + 1 == parts).cpu())
    return losses


@pytest.mark.parametrize(
    ("name", "changes"),
    [("vit", {}), ("vit", {"amp": True}), ("resnet", {"micro_batches": 2}), ("swin", {"freeze": 1}), ("cnn", {})],
)
def test_training_does_not_notice(name, changes):
    plain, moved = (training(name, away, **changes) for away in (False, True))
    assert bits(steps(plain)) == bits(steps(moved))
    assert bits(plain.net.state_dict()) == bits(moved.net.state_dict())


def test_a_boundary_comes_back_when_the_module_behind_has_gone_backward(monkeypatch):
    """Until then nothing of it is on the device, but while its own module runs for the first time."""
    state, resting, seen = training("vit", away=True), [], []
    send = state.away

    def sent(boundary):
        resting.append((boundary.shape, send(boundary)))
        return resting[-1][1]

    state.away, run = sent, state.net.run_phase

    def run_phase(phase, carry, *others):
        result = run(phase, carry, *others)
        seen.append((phase.kind, phase.module, [own._back is not None for _, own in resting]))
        assert all(isinstance(own, OnHost) for own in carry.boundaries)
        return result

    monkeypatch.setattr(state.net, "run_phase", run_phase)
    steps(state, 1)
    assert seen == [
        ("first", 0, [False]),
        ("first", 1, [False, False]),
        ("last", 2, [False, True]),
        ("again", 1, [True, False]),
        ("again", 0, [False, False]),
    ]
    assert [own._host.shape for _, own in resting] == [shape for shape, _ in resting]


def test_it_keeps_strides_and_what_needs_a_gradient():
    boundary = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    own = OnHost(boundary)
    back = own.take()
    assert torch.equal(back, boundary)
    assert back.stride() == boundary.stride()
    assert back.requires_grad
    assert back.is_leaf
    assert not OnHost(boundary.detach()).take().requires_grad


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "end-to-end", "--modules", "2", "--device", "cpu"], "--offload-boundaries needs CUDA"),
        (["--method", "end-to-end"], "is for exact training in several modules; leave it out"),
        (["--method", "greedy", "--modules", "2"], "is for exact training in several modules; leave it out"),
    ],
)
def test_what_it_cannot_do_is_one_line(flags, message, tmp_path, capsys):
    assert main(["train", "--offload-boundaries", *flags, "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("amp", [False, True])
def test_training_on_cuda_does_not_notice(amp, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # as in a run, or no two trainings are equal
    results = []
    for away in (False, True):
        state = training("vit", away, "cuda", amp=amp, micro_batches=2, offload_boundaries=away)
        results.append((bits(steps(state, 4, "cuda")), bits(state.net.state_dict())))
    assert results[0] == results[1]
