"""Checkpoints: exact round trips, and damage, kills and full disks that lose nothing."""

import errno
import os
import random
import shutil
import signal
import struct
import subprocess
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from localprop import checkpoint as module
from localprop.checkpoint import (
    load_checkpoint,
    newest_checkpoint,
    publish,
    save_checkpoint,
    save_weights,
    write_parts,
    write_text,
)
from localprop.errors import CheckpointError


def bits(value):
    """The exact content of a nested value: types, key order, and every bit of floats and tensors."""
    if isinstance(value, torch.Tensor):
        # numpy has no bfloat16, and NaN differs from itself: compare bytes.
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return (value.dtype, tuple(value.shape), data)
    if isinstance(value, dict):
        return ("dict", [(type(key), key, bits(item)) for key, item in value.items()])
    if isinstance(value, (list, tuple)):
        return (type(value), [bits(item) for item in value])
    if isinstance(value, float):
        return (float, "nan" if value != value else struct.pack("d", value))
    return (type(value), value)


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
    "plain": [None, True, False, 0, 1, -(2**70), "", "ü\n\0\u2028", "nan", torch.bfloat16],
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


REFUSED = [{1, 2}, {1.5: 0}, {True: 0}, Path("x"), torch.Size([1]), 1j, torch.zeros(1, dtype=torch.cfloat)]


@pytest.mark.parametrize("value", REFUSED, ids=str)
def test_what_cannot_come_back_exactly_is_refused(tmp_path, value):
    with pytest.raises(CheckpointError, match=r"cannot save the .* at module-0/deep/0") as caught:
        save_checkpoint(tmp_path, 1, {"module-0": {"deep": [value]}}, {}, keep=1)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


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


def state_at(step: int) -> dict:
    return {
        "module-0": {"units": torch.full((50,), step), "step": step},
        "module-1": [torch.full((9,), -step)],
    }


def save(folder: Path, *steps: int, keep: int = 9) -> Path:
    for step in steps:
        path = save_checkpoint(folder, step, state_at(step), {"epoch": step // 10}, keep)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_same_state_gives_the_same_bytes_in_any_layout(tmp_path):
    whole = save(tmp_path / "whole", 5)
    checksums = {}
    for part in ("module-1", "module-0"):  # each process writes its own; one makes it count
        checksums |= write_parts(tmp_path / "split", 5, {part: state_at(5)[part]})
        assert newest_checkpoint(tmp_path / "split") == (None, [])
    split = publish(tmp_path / "split", 5, checksums, {"epoch": 0}, keep=9)
    assert names(split) == names(whole)
    assert {file.name: file.read_bytes() for file in split.iterdir()} == {
        file.name: file.read_bytes() for file in whole.iterdir()
    }


def test_only_some_parts_are_read_and_all_are_verified(tmp_path):
    path = save(tmp_path, 5)
    assert list(load_checkpoint(path, only=["module-1"]).parts) == ["module-1"]
    flip(path / "module-0.safetensors")
    with pytest.raises(CheckpointError, match=r"module-0\.safetensors is damaged"):
        load_checkpoint(path, only=["module-1"])


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
    for step in (7, 8):
        (tmp_path / f".step-{step:08d}.tmp").mkdir()
        (tmp_path / f".step-{step:08d}.tmp" / "module-9.safetensors").write_bytes(b"half")
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


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


FILES = ["module-0.safetensors", "module-1.safetensors", "manifest.json", "SHA256SUMS"]


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink, lambda file: file.write_bytes(b"")])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, name, damage):
    save(tmp_path, 10, 20)
    damage(tmp_path / "step-00000020" / name)
    found, passed_over = newest_checkpoint(tmp_path)
    assert found.step == 10
    assert bits(found.parts) == bits(state_at(10))
    assert len(passed_over) == 1
    assert str(tmp_path / "step-00000020") in passed_over[0]
    # A changed SHA256SUMS is seen in the file whose line it was.
    assert name in passed_over[0] or "SHA256SUMS" in passed_over[0]
    assert "resume from another checkpoint" in passed_over[0]
    assert "\n" not in passed_over[0]


def test_every_flipped_bit_is_noticed(tmp_path):
    path = save(tmp_path, 10)
    rng = random.Random(0)
    for name in FILES:
        file = path / name
        content = file.read_bytes()
        for place in rng.sample(range(len(content)), 60):
            damaged = bytearray(content)
            damaged[place] ^= 1 << rng.randrange(8)
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError, match="damaged"):
                load_checkpoint(path)
        file.write_bytes(content)
    assert load_checkpoint(path).step == 10


def test_nothing_valid(tmp_path):
    assert newest_checkpoint(tmp_path / "missing") == (None, [])
    save(tmp_path, 10, 20)
    for path in list(tmp_path.iterdir()):
        (path / "manifest.json").unlink()
    found, passed_over = newest_checkpoint(tmp_path)
    assert found is None
    assert [line.split("/")[-2] for line in passed_over] == ["step-00000020", "step-00000010"]
    with pytest.raises(CheckpointError, match="SHA256SUMS is missing"):
        load_checkpoint(tmp_path / "step-00000030")


def test_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FORMAT", 99)
    path = save(tmp_path, 10)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="another version of localprop"):
        load_checkpoint(path)


def marked(step: int) -> dict:
    return {f"module-{k}": [torch.full((3000 * (k + 1),), step + k), step] for k in range(3)}


def save_until_killed(folder: Path, step: int, keep: int, report: int) -> None:
    """In a forked process: saves step after step, and reports each that is saved."""
    try:
        torch.set_num_threads(1)
        for new in range(step + 1, step + 10_000):
            save_checkpoint(folder, new, marked(new), {"step": new}, keep)
            os.write(report, new.to_bytes(4, "big"))
    finally:
        os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kills_at_random_moments_lose_nothing(tmp_path):
    rng, step, interrupted = random.Random(1), 0, 0
    for kill in range(30):
        reader, writer = os.pipe()
        if not (child := os.fork()):
            save_until_killed(tmp_path, step, 1 + kill % 2, writer)
        os.close(writer)
        saved = os.read(reader, 4)
        time.sleep(rng.random() * 0.03)
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        while block := os.read(reader, 4):
            saved = block
        os.close(reader)
        found, passed_over = newest_checkpoint(tmp_path)
        assert found is not None
        assert passed_over == []
        step = found.step
        # The kill may come between a save and its report.
        assert step - int.from_bytes(saved, "big") in (0, 1)
        assert found.meta == {"step": step}
        assert bits(found.parts) == bits(marked(step))
        interrupted += any(path.name.startswith(".") for path in tmp_path.iterdir())
    assert interrupted >= 5  # else the kills came between the saves


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MiB, mounted where only a process that ends with the test sees it."""
    mount = 'mount -t tmpfs -o size=1m none "$0" && echo mounted && read line'
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, str(tmp_path)]
    if not shutil.which("unshare"):
        pytest.skip("no unshare")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **pipes) as process:
        disk = Path(f"/proc/{process.pid}/root{tmp_path}")
        if process.stdout.readline() != b"mounted\n" or not os.access(disk, os.W_OK):
            process.kill()
            pytest.skip("this system does not let a test mount a small disk")
        yield disk
        process.kill()


def test_a_disk_that_is_really_full(small_disk):
    assert shutil.disk_usage(small_disk).total == 2**20
    folder, weights = small_disk / "checkpoints", small_disk / "model.safetensors"
    save_checkpoint(folder, 1, {"module-0": torch.ones(60_000)}, {}, keep=1)
    save_weights(weights, {"weight": torch.ones(60_000)})
    before = weights.read_bytes()
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(folder, 2, {"a": torch.ones(60_000), "b": torch.ones(90_000)}, {}, keep=1)
    assert str(caught.value) == (
        f"cannot write {folder / 'step-00000002'}: No space left on device; free some disk space; "
        "earlier checkpoints are untouched, go on with --resume"
    )
    with pytest.raises(CheckpointError) as caught:
        save_weights(weights, {"weight": torch.ones(150_000)})
    assert str(caught.value) == f"cannot write {weights}: No space left on device; free some disk space"
    assert names(small_disk) == ["checkpoints", "model.safetensors"]
    assert names(folder) == ["step-00000001"]
    assert weights.read_bytes() == before
    assert newest_checkpoint(folder)[0].parts["module-0"].eq(1).all()
    save_checkpoint(folder, 2, {"module-0": torch.ones(60_000)}, {}, keep=1)
    assert names(folder) == ["step-00000002"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_text_on_a_full_disk(tmp_path):
    path = tmp_path / "results.csv"
    write_text(path, "old")
    (tmp_path / ".results.csv.tmp").mkdir()
    (tmp_path / ".results.csv.tmp" / "results.csv").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"results\.csv: No space left on device; free some disk space$"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["results.csv"]


WORDS = {
    errno.ENOSPC: "No space left on device; free some disk space",
    errno.EDQUOT: "your quota",
    errno.EACCES: "Permission denied; choose a folder that you may write to",
    errno.EROFS: "Read-only file system; choose a folder that can be written to",
    errno.EIO: "check the disk",
}


@pytest.mark.parametrize("code", WORDS, ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["save_file", "save_file before 0.5", "fsync", "rename"])
def test_whatever_fails_leaves_the_older_checkpoint(tmp_path, monkeypatch, code, call):
    save(tmp_path, 10)

    def fail(*_):
        if call == "save_file":
            raise SafetensorError(f"Error while serializing: I/O error: reason (os error {code})")
        if call == "save_file before 0.5":
            raise SafetensorError(f"Error while serializing: IoError(Os {{ code: {code}, kind: Other }})")
        raise OSError(code, os.strerror(code))

    owner, name = {"fsync": (os, "fsync"), "rename": (Path, "rename")}.get(call, (module, "save_file"))
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, 20, keep=1)
    monkeypatch.undo()
    message = str(caught.value)
    assert message.startswith(f"cannot write {tmp_path / 'step-00000020'}: ")
    assert WORDS[code] in message
    assert "\n" not in message
    assert names(tmp_path) == ["step-00000010"]
    assert newest_checkpoint(tmp_path)[0].step == 10
    save(tmp_path, 20, keep=1)
    assert names(tmp_path) == ["step-00000020"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Not a directory; check the disk and the path"):
        save(tmp_path / "file" / "checkpoints", 1)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match="choose a folder that you may write to"):
        save(tmp_path / "closed", 1)


def test_everything_is_synced_before_it_counts(tmp_path, monkeypatch):
    """Each file and the folder before the rename, the parent after it."""
    calls = []
    sync, rename = module._sync, Path.rename

    def noted_sync(path):
        calls.append(("sync", path.name))
        sync(path)

    def noted_rename(self, target):
        calls.append(("rename", target.name))
        return rename(self, target)

    monkeypatch.setattr(module, "_sync", noted_sync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    folder = tmp_path / "checkpoints"
    save(folder, 3)
    renamed = calls.index(("rename", "step-00000003"))
    assert {name for _, name in calls[:renamed]} == {*FILES, ".step-00000003.tmp"}
    assert calls[renamed - 1] == ("sync", ".step-00000003.tmp")
    assert calls[renamed + 1 :] == [("sync", "checkpoints")]


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
