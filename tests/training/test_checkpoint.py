"""Checkpoints come back bit for bit, and old ones make room."""

import os
import random
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from checkpoint_states import bits, flip, names, save, state_at
from localprop.errors import CheckpointError
from localprop.system.files import write_text
from localprop.training.checkpoints import folder as module
from localprop.training.checkpoints.folder import (
    begin_checkpoint,
    load_checkpoint,
    newest_checkpoint,
    publish,
    save_checkpoint,
    write_parts,
)
from localprop.training.checkpoints.format import save_weights

DTYPES = "float64 float32 float16 bfloat16 bool int64 int32 int16 int8 uint8"
NASTY = {
    "dtypes": {name: torch.arange(-3, 9).to(getattr(torch, name)) for name in DTYPES.split()},
    "scalar": torch.tensor(2.5),
    "empty": [torch.empty(0), torch.empty(3, 0, 2, dtype=torch.bfloat16)],
    "transposed": torch.arange(12.0).reshape(3, 4).t(),
    "channels last": torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
    "strided": torch.arange(10)[1::3],
    "expanded": torch.ones(1, 3).expand(4, 3),
    "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
    "payload": torch.tensor([0x7FC01234, -1, 0x7F800001], dtype=torch.int32).view(torch.float32),
    "parameter": nn.Parameter(torch.randn(2, 2)),
    "state": {0: {"step": torch.tensor(3.0)}, 1: {}, -7: None},
    "mixed keys": {0: torch.zeros(1), "0": torch.ones(1), "": 1},
    "colliding": {"a/b": torch.zeros(1), "a": {"b": torch.ones(1)}},
    "looks like a tag": {"$tensor": "x", "$tuple": [1], "$dict": [], "$float": "nan"},
    "tagged later": {"a": 1, "$float": "nan"},
    "__metadata__": torch.ones(2),
    "betas": (0.9, (0.999, [1, (), []]), {}),
    "floats": [float("inf"), float("-inf"), float("nan"), -0.0, 0.1, 1e-323, 1.0, 1e22, 2**53 + 1.0],
    "plain": [None, True, False, 0, 1, -(2**70), "", "ü\n\0\u2028", "nan", torch.bfloat16, torch.Size([2, 3])],
}


def test_nasty_structure_comes_back_bit_for_bit(tmp_path):
    parts = {"module-10": NASTY, "module-2": torch.ones(3), "scaler": {}, "lone": None}
    meta = {"epoch": 3, "best": float("-inf"), "by module": {0: (1, 2)}, "config": {"lr": 1e-3}}
    path = save_checkpoint(tmp_path, 1234, parts, meta, keep=2)
    assert path == tmp_path / "step-00001234"
    assert names(path) == sorted(["SHA256SUMS", "manifest.json", *(f"{name}.safetensors" for name in parts)])
    loaded = load_checkpoint(path)
    assert (loaded.step, loaded.path) == (1234, path)
    assert bits(loaded.meta) == bits(meta)
    assert list(loaded.parts) == sorted(parts)
    for name, part in parts.items():
        assert bits(loaded.parts[name]) == bits(part), name


def random_value(rng: random.Random, depth: int):
    kind = rng.randrange(10 if depth else 7)
    if kind < 3:
        dtype = rng.choice([torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.float16])
        shape = [rng.randrange(4) for _ in range(rng.randrange(4))]
        raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
        return (raw.view(dtype) if raw.numel() else torch.empty(*shape, 1, dtype=dtype)).squeeze(-1)
    if kind == 3:
        return struct.unpack("d", rng.randbytes(8))[0]
    if kind == 4:
        return rng.choice([None, True, False, rng.randrange(-(10**20), 10**20)])
    if kind < 7:
        return "".join(chr(rng.randrange(1, 0xD800)) for _ in range(rng.randrange(5)))
    size = rng.randrange(5)
    if kind == 9:
        keys = [rng.choice([rng.randrange(3), rng.choice("01$a/"), "$tensor", "a/0"]) for _ in range(size)]
        return {key: random_value(rng, depth - 1) for key in keys}
    return (list, tuple)[kind - 7](random_value(rng, depth - 1) for _ in range(size))


def test_random_structures_come_back_bit_for_bit(tmp_path):
    rng = random.Random(0)
    torch.manual_seed(0)
    parts = {f"part-{index:03}": [random_value(rng, 4) for _ in range(4)] for index in range(100)}
    loaded = load_checkpoint(save_checkpoint(tmp_path, 1, parts, {}, keep=1))
    assert bits(loaded.parts) == bits(parts)


def test_tensors_that_share_memory_are_saved_each(tmp_path):
    whole = torch.arange(10.0)
    part = {"whole": whole, "slice": whole[2:4], "again": whole, "bytes": whole.view(torch.uint8)}
    loaded = load_checkpoint(save_checkpoint(tmp_path, 1, {"part": part}, {}, keep=1)).parts["part"]
    assert bits(loaded) == bits(part)
    loaded["whole"].zero_()
    assert bits(loaded["again"]) == bits(whole)


def test_loaded_tensors_own_their_memory(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"part": [torch.ones(1, dtype=torch.uint8), torch.ones(4096)]}, {}, keep=1)
    tensors = load_checkpoint(path).parts["part"]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)  # as torch allocates, unlike the file
    with (path / "part.safetensors").open("r+b") as file:
        file.write(bytes(file.seek(0, os.SEEK_END)))
    assert all(tensor.eq(1).all() for tensor in tensors)


REFUSED = [{1, 2}, {1.5: 0}, {True: 0}, Path("x"), 1j, torch.zeros(1, dtype=torch.cfloat)]


@pytest.mark.parametrize("value", REFUSED, ids=str)
def test_what_cannot_come_back_exactly_is_refused(tmp_path, value):
    with pytest.raises(CheckpointError, match=r"cannot save the .* at module-0/deep/0") as caught:
        save_checkpoint(tmp_path, 1, {"module-0": {"deep": [value]}}, {}, keep=1)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_tensors_made_of_others_come_back(tmp_path):
    inner = TwoTensor(torch.arange(6.0).reshape(2, 3), torch.zeros(2, 3))
    value = TwoTensor(inner, TwoTensor(torch.ones(2, 3), torch.full((2, 3), float("nan"))))
    path = save_checkpoint(tmp_path, 1, {"part": {"moment": value, "same place": inner.a}}, {}, keep=1)
    loaded = load_checkpoint(path).parts["part"]["moment"]
    assert type(loaded) is type(loaded.a) is TwoTensor
    assert (loaded.shape, loaded.stride()) == (value.shape, value.stride())
    for pair, own in ((loaded.a, value.a), (loaded.b, value.b)):
        assert bits([pair.a, pair.b]) == bits([own.a, own.b])
    with pytest.raises(CheckpointError, match="at meta/best/a"):
        save_checkpoint(tmp_path, 2, {}, {"best": inner}, keep=1)


def test_a_file_does_not_choose_what_is_imported(tmp_path):
    class Gone(TwoTensor):
        pass

    Gone.__module__ = "this.library"  # importing it would print a poem
    parts = {"module-0": Gone(torch.ones(2), torch.ones(2)), "backbone": {}}
    path = save_checkpoint(tmp_path, 1, parts, {}, keep=1)
    Gone.__module__ = __name__
    with pytest.raises(CheckpointError, match=r"holds a this\.library\..*Gone, which is not loaded; install") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert "this" not in sys.modules
    assert load_checkpoint(path, only=["backbone"]).parts == {"backbone": {}}


def test_tensor_in_meta_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="Tensor at meta/best"):
        save_checkpoint(tmp_path, 1, {}, {"best": torch.ones(1)}, keep=1)
    assert list(tmp_path.iterdir()) == []


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


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 6, bias=False)
        self.head = nn.Linear(4, 6)
        self.head.weight = self.embed.weight


def test_tied_weights_survive(tmp_path):
    net = Tied()
    save_weights(tmp_path / "model.safetensors", net.state_dict())
    other = Tied()
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert other.head.weight is other.embed.weight
    assert bits(other.state_dict()) == bits(net.state_dict())


def test_timm_reads_the_weights(tmp_path):
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    net = timm.create_model("vit_tiny_patch16_224", **options).eval()
    path = tmp_path / "run" / "model.safetensors"
    path.parent.mkdir()
    save_weights(path, net.state_dict(), {"model": "vit", "ä": '"\\\n\x7f'})
    loaded = timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(path), **options).eval()
    images = torch.randn(2, 3, 16, 16)
    assert bits(loaded(images)) == bits(net(images))
    fresh = timm.create_model("vit_tiny_patch16_224", **options)
    fresh.load_state_dict(load_file(path), strict=True)
    assert bits(dict(fresh.state_dict())) == bits(dict(net.state_dict()))
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"model": "vit", "ä": '"\\\n\x7f'}
    assert names(tmp_path / "run") == ["model.safetensors"]


def test_same_weights_give_the_same_file(tmp_path):
    metadata = {key: key.upper() for key in ["the", "order", "of", "these", "would", "vary"]}
    files = [tmp_path / f"{index}.safetensors" for index in range(8)]
    for file in files:
        save_weights(file, {"weight": torch.arange(5.0), "bias": torch.zeros(2)}, metadata)
    assert len({file.read_bytes() for file in files}) == 1


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_tensors(tmp_path):
    part = {
        "a": torch.randn(3, 4, device="cuda").t(),
        "b": [torch.ones((), device="cuda", dtype=torch.bfloat16)],
    }
    path = save_checkpoint(tmp_path, 1, {"module-0": part}, {}, keep=1)
    for device in ("cpu", "cuda"):
        loaded = load_checkpoint(path, device).parts["module-0"]
        assert {loaded["a"].device.type, loaded["b"][0].device.type} == {device}
        assert bits(loaded) == bits(part)
