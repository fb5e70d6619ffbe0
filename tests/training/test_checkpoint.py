"""Checkpoints come back bit for bit, and old ones make room."""

import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from checkpoint_states import bits, flip, names, save, state_at
from localprop.errors import CheckpointError
from localprop.system.files import write_text
from localprop.training.checkpoints import saving as module
from localprop.training.checkpoints.format import save_weights
from localprop.training.checkpoints.loading import load_checkpoint, newest_checkpoint
from localprop.training.checkpoints.saving import begin_checkpoint, publish, save_checkpoint, write_parts


def trained(optimizer_class, state=None, steps=4, **options):
    """A small network after `steps` more training steps with gradient scaling; deterministic in its start."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    optimizer = optimizer_class(net.parameters(), lr=0.01, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=3)
    if state:
        net.load_state_dict(state["units"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
    for _ in range(steps):
        loss = nn.functional.cross_entropy(net(torch.randn(8, 3, 6, 6)), torch.randint(5, (8,)))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    states = {"units": net.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    return states | {"rng": torch.get_rng_state()}


@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (torch.optim.AdamW, {"betas": (0.8, 0.99)}),
        (torch.optim.AdamW, {"amsgrad": True, "foreach": True}),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    ],
)
def test_interrupted_training_goes_on_bit_for_bit(tmp_path, optimizer_class, options):
    uninterrupted = trained(optimizer_class, steps=8, **options)
    half = trained(optimizer_class, steps=4, **options)
    loaded = load_checkpoint(save_checkpoint(tmp_path, 4, {"module-0": half}, {}, keep=1)).parts["module-0"]
    assert bits(loaded["optimizer"]) == bits(half["optimizer"])
    continued = trained(optimizer_class, loaded, steps=4, **options)
    for part in uninterrupted:
        assert bits(continued[part]) == bits(uninterrupted[part]), part
    assert bits(half["units"]) != bits(uninterrupted["units"])


def test_same_state_gives_the_same_bytes_in_any_layout(tmp_path):
    whole = save(tmp_path / "whole", 5)
    checksums = {}
    aside = begin_checkpoint(tmp_path / "split", 5)
    for part in ("module-1", "module-0"):  # each process writes its own; one makes it count
        checksums |= write_parts(aside, 5, {part: state_at(5)[part]})
        assert newest_checkpoint(tmp_path / "split") == (None, [])
    split = publish(aside, 5, checksums, {"epoch": 0}, keep=9)
    assert names(split) == names(whole)
    assert {file.name: file.read_bytes() for file in split.iterdir()} == {
        file.name: file.read_bytes() for file in whole.iterdir()
    }


def test_only_the_parts_that_are_asked_for_are_verified_and_read(tmp_path):
    path = save(tmp_path, 5)
    assert list(load_checkpoint(path, only=["module-1"]).parts) == ["module-1"]
    flip(path / "module-0.safetensors")
    assert list(load_checkpoint(path, only=["module-1"]).parts) == ["module-1"]
    with pytest.raises(CheckpointError, match=r"module-0\.safetensors is damaged"):
        load_checkpoint(path, only=["module-0"])


def test_processes_that_read_different_parts_take_the_same_checkpoint(tmp_path):
    """One finds its part damaged, the other cannot take the next one over: both take the third."""
    for step in (5, 10, 15):
        save(tmp_path, step, keep=3)
    flip(tmp_path / "step-00000015" / "module-0.safetensors")
    both = threading.Barrier(2, timeout=30)
    told, found, accepted = [None, None], [None, None], [[], []]

    def run(rank):
        def agree(reason):
            told[rank] = reason
            both.wait()
            result = told[0] or told[1]
            both.wait()
            return result

        def accept(checkpoint):
            accepted[rank].append(checkpoint.step)
            return "it is of another network" if rank and checkpoint.step == 10 else None

        own = [f"module-{rank}"]
        found[rank] = newest_checkpoint(tmp_path, only=own, accept=accept, agree=agree)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert accepted == [[10, 5], [10, 5]]
    assert [checkpoint.step for checkpoint, _ in found] == [5, 5]
    for _, lines in found:
        assert "module-0.safetensors is damaged" in lines[0]
        assert lines[1].endswith("step-00000010: it is of another network")


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum")
def test_checksums_are_those_of_sha256sum(tmp_path):
    path = save(tmp_path, 5)
    check = [shutil.which("sha256sum"), "--check", "--strict", "SHA256SUMS"]
    report = subprocess.run(check, cwd=path, capture_output=True, text=True, check=True).stdout
    assert report.splitlines() == [f"{name}: OK" for name in names(path) if name != "SHA256SUMS"]


def test_keep(tmp_path):
    save(tmp_path, 10, 20, 30, 40, keep=3)
    assert names(tmp_path) == ["step-00000020", "step-00000030", "step-00000040"]
    save(tmp_path, 99_999_999, 100_000_000)  # ordered as numbers, not as words
    assert {"step-99999999", "step-100000000"} < set(names(tmp_path))
    assert newest_checkpoint(tmp_path)[0].step == 100_000_000
    save(tmp_path, 123_456_789, keep=1)
    assert names(tmp_path) == ["step-123456789"]


def test_a_damaged_later_checkpoint_does_not_push_out_the_new_one(tmp_path):
    flip(save(tmp_path, 10, 20, 30) / "module-0.safetensors")
    save(tmp_path, 25, keep=2)
    assert names(tmp_path) == ["step-00000020", "step-00000025"]


def test_stale_temporary_folders_are_removed_after_the_save(tmp_path):
    for name in (".step-00000007.tmp", ".step-00000008.tmp", ".step-00000008.0123456789abcdef.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "module-9.safetensors").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("not ours")
    path = save(tmp_path, 8)
    assert names(tmp_path) == ["notes.txt", "step-00000008"]
    assert "module-9.safetensors" not in names(path)
    (path / "notes.txt").write_text("an unknown file is harmless")
    assert newest_checkpoint(tmp_path)[0].step == 8


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 5, {"ema": 0}, {"epoch": 0}, keep=1)
    monkeypatch.setattr(module, "_prune", lambda *_: None)  # killed when the new one is there, the old one too
    save_checkpoint(tmp_path, 5, {"ema": 1}, {"epoch": 0}, keep=1)
    monkeypatch.undo()
    assert names(tmp_path) == ["step-00000005", "step-00000005.old"]
    assert newest_checkpoint(tmp_path)[0].parts == {"ema": 1}
    save_checkpoint(tmp_path, 5, {"ema": 2}, {"epoch": 1}, keep=1)
    assert names(tmp_path) == ["step-00000005"]
    assert newest_checkpoint(tmp_path)[0].parts == {"ema": 2}


def test_a_kill_while_one_is_replaced_loses_nothing(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 5, {"ema": 1}, {}, keep=1)
    rename = Path.rename

    def killed(self, target):
        if self.name.startswith("."):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 5, {"ema": 2}, {}, keep=1)
    monkeypatch.undo()
    assert newest_checkpoint(tmp_path)[0].parts == {"ema": 1}
    save_checkpoint(tmp_path, 5, {"ema": 3}, {}, keep=1)
    assert names(tmp_path) == ["step-00000005"]
    assert newest_checkpoint(tmp_path)[0].parts == {"ema": 3}


def test_files_are_readable_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        path = save(tmp_path, 1)
        save_weights(tmp_path / "model.safetensors", {"weight": torch.ones(1)})
        write_text(tmp_path / "args.yaml", "")
    finally:
        os.umask(before)
    files = [*path.iterdir(), tmp_path / "model.safetensors", tmp_path / "args.yaml"]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o640}


def test_write_text_replaces_the_whole_file(tmp_path):
    path = tmp_path / "run" / "args.yaml"
    path.parent.mkdir()
    write_text(path, "a much longer text")
    with path.open() as reader:
        write_text(path, "ü\r\n")
        assert reader.read() == "a much longer text"  # whoever reads it sees one text, never a mixture
    assert path.read_bytes() == b"\xc3\xbc\r\n"
    assert names(path.parent) == ["args.yaml"]
