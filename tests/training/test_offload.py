"""Optimizer states that rest on the host: what is where when, and that training does not notice."""

from dataclasses import replace
from functools import partial

import pytest
import timm
import torch

from checkpoint_states import bits
from localprop import localize
from localprop.cli import main
from localprop.settings.config import OptimConfig
from localprop.training import state as state_module
from localprop.training.checkpoints.loading import load_checkpoint
from localprop.training.checkpoints.saving import save_checkpoint
from localprop.training.state import TrainingState
from localprop.training.stepping.offload import Offload
from tiny import SIZE, batch, split

CONFIG = OptimConfig(epochs=4, lr=1e-2, sched="cosine", warmup_epochs=0, clip_grad=1.0)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def training(opt="adamw", offload=False, device="cpu", least=0, name="vit", **changes):
    device = torch.device(device)
    state = TrainingState(split(name).to(device), replace(CONFIG, opt=opt, **changes), 10, device)
    if offload and device.type == "cpu":  # beside a CPU the host is another place in the same memory
        state.steps.offload = Offload(state.optimizers, device, least)
    return state


def steps(state, count, device="cpu"):
    state.net.train()
    return [state.train_step([t.to(device) for t in batch()], seed=state.step).cpu() for _ in range(count)]


def moments(state):
    values = [value for o in state.optimizers for own in o.state.values() for value in own.values()]
    return [value for value in values if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize(("backwards", "order"), [(False, [0, 1, 2]), (True, [2, 1, 0])])
def test_the_state_that_is_stepped_next_comes_first(backwards, order):
    state, fetched = training(), []
    offload = Offload(state.optimizers, torch.device("cpu"), least=0, backwards=backwards)
    offload.fetch = fetched.append
    assert offload.first == order[0]
    for k in order:
        with offload.present(k):
            pass
    assert list(dict.fromkeys(fetched)) == order
    assert fetched == [order[0], *(k for k in order[1:] for _ in range(2))]


# nadam's states have python numbers beside tensors, adafactor's change from step to step
@pytest.mark.parametrize("opt", ["adamw", "sgd", "lion", "nadamw", "adafactor", "adamw8bit"])
def test_training_does_not_notice(opt, tmp_path):
    if opt == "adamw8bit":
        pytest.importorskip("torchao.optim", reason="no torchao for this torch", exc_type=ImportError)
    plain, moved = training(opt), training(opt, offload=True)
    assert bits(steps(plain, 3)) == bits(steps(moved, 3))
    assert bits(plain.net.state_dict()) == bits(moved.net.state_dict())
    paths = [save_checkpoint(tmp_path / name, 3, s.parts(), {}, 1) for name, s in (("a", plain), ("b", moved))]
    for file in paths[0].iterdir():
        assert file.read_bytes() == (paths[1] / file.name).read_bytes(), file.name
    other = training(opt, offload=True)
    other.load(load_checkpoint(paths[0]).parts, 3)
    assert bits(steps(plain, 2)) == bits(steps(other, 2))
    assert bits(plain.net.state_dict()) == bits(other.net.state_dict())


def test_one_module_is_there_at_a_time(monkeypatch):
    state = training(offload=True)
    steps(state, 1)
    on_device, most = set(), []
    to_device, to_host = Offload._to_device, Offload._to_host

    def fetched(self, tensor):
        result = to_device(self, tensor)
        on_device.add(result.untyped_storage()._cdata)
        kept.append(result)
        most.append(sum(t.nbytes for t in kept if t.untyped_storage()._cdata in on_device))
        return result

    def sent(self, tensor):
        on_device.remove(tensor.untyped_storage()._cdata)
        return to_host(self, tensor)

    kept = []
    monkeypatch.setattr(Offload, "_to_device", fetched)
    monkeypatch.setattr(Offload, "_to_host", sent)
    steps(state, 2)
    assert not on_device
    sizes = [sum(v.nbytes for own in o.state.values() for v in own.values()) for o in state.optimizers]
    assert max(most) == max(sizes)
    assert sum(t.nbytes for t in kept) == 2 * sum(sizes)


def test_small_tensors_stay():
    state = training(offload=True, least=4096)
    steps(state, 1)
    before = moments(state)
    steps(state, 1)
    stayed = [a is b for a, b in zip(before, moments(state), strict=True)]
    assert stayed == [value.nbytes < 4096 for value in before]
    assert {True, False} == set(stayed)


def test_a_state_before_the_first_step_rests_on_the_host_too(monkeypatch):
    sent, to_host = [], Offload._to_host

    def note(self, tensor):
        sent.append(tensor.nbytes)
        return to_host(self, tensor)

    monkeypatch.setattr(Offload, "_to_host", note)
    state = training("momentum", offload=True, amp=True, amp_dtype="float16")
    assert sum(sent) == sum(parameter.nbytes for parameter in state.net.parameters())


def test_a_failed_step_leaves_a_state_that_goes_on():
    plain, moved = training(), training(offload=True)
    for state in (plain, moved):
        steps(state, 2)
        images, labels = batch()
        with pytest.raises(Exception, match="the loss of module 1"):
            state.train_step([images * float("nan"), labels], seed=0)
        steps(state, 1)
    assert bits(plain.net.state_dict()) == bits(moved.net.state_dict())


def test_on_a_cpu_the_flag_is_one_line(tmp_path, capsys):
    assert main(["train", "--offload-optimizer", "--device", "cpu", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "--offload-optimizer needs CUDA" in error
    assert error.count("\n") == 1


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("opt", ["adamw", "sgd", "nadamw", "adamw8bit"])
@pytest.mark.parametrize("amp_dtype", [None, "float16"])
def test_training_on_cuda_does_not_notice(opt, amp_dtype, tmp_path, monkeypatch):
    if opt == "adamw8bit":
        pytest.importorskip("torchao.optim", reason="no torchao for this torch", exc_type=ImportError)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # as in a run, or no two trainings are equal
    monkeypatch.setattr(state_module, "Offload", partial(Offload, least=0))
    amp = {"amp": amp_dtype is not None, "amp_dtype": amp_dtype or "bfloat16"}
    results = []
    for offload in (False, True):
        state = training(opt, device="cuda", name="mlp", offload_optimizer=offload, **amp)
        assert (state.steps.offload is not None) == offload
        with torch.autocast("cuda", torch.float16, enabled=amp["amp"]):
            losses = steps(state, 4, "cuda")
            path = save_checkpoint(tmp_path / str(offload), 4, state.parts(), {}, 1)
            other = training(opt, device="cuda", name="mlp", offload_optimizer=offload, **amp)
            other.load(load_checkpoint(path).parts, 4)
            again = steps(other, 2, "cuda")
            assert bits(steps(state, 2, "cuda")) == bits(again)
        assert bits(other.net.state_dict()) == bits(state.net.state_dict())
        files = {file.name: file.read_bytes() for file in path.iterdir()}
        results.append((bits([losses, again]), bits(state.net.state_dict()), files))
        if offload:
            big = [value for value in moments(state) if value.ndim]
            assert big
            assert all(value.device.type == "cpu" and value.is_pinned() for value in big)
    assert results[0] == results[1]


@pytest.mark.gpu
@needs_cuda
def test_less_memory_on_cuda():
    device, peaks, states = torch.device("cuda"), [], 0
    for offload in (False, True):
        model = timm.create_model("vit_base_patch16_224", img_size=32, depth=6, num_classes=5)
        net = localize(model, method="greedy", cuts=[f"blocks.{k}" for k in range(5)], input_size=SIZE).to(device)
        state = TrainingState(net, replace(CONFIG, offload_optimizer=offload), 10, device)
        steps(state, 2, "cuda")
        torch.cuda.reset_peak_memory_stats()
        steps(state, 2, "cuda")
        peaks.append(torch.cuda.max_memory_allocated())
        states = 8 * sum(p.numel() for p in net.parameters())
        del model, net, state
    # Five of six states, less what rests on the device for a moment while it travels.
    assert peaks[0] - peaks[1] > 0.5 * states
