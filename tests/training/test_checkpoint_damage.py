"""Damage, kills and full disks lose no checkpoint."""

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from checkpoint_states import bits, flip, names, save, state_at
from localprop.errors import CheckpointError
from localprop.system.files import write_text
from localprop.training.checkpoints import format as form
from localprop.training.checkpoints import saving as module
from localprop.training.checkpoints.format import save_weights
from localprop.training.checkpoints.loading import load_checkpoint, newest_checkpoint
from localprop.training.checkpoints.saving import save_checkpoint


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
        "earlier checkpoints are untouched, continue with --resume"
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


def test_text_on_a_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "results.csv"
    write_text(path, "old")

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
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

    owner, name = {"fsync": (os, "fsync"), "rename": (Path, "rename")}.get(call, (form, "save_file"))
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


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_everything_is_synced_before_it_counts(tmp_path, monkeypatch):
    """Each file and the folder before the rename, the parent after it."""
    calls = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(descriptor):
        calls.append(("sync", Path(f"/proc/self/fd/{descriptor}").resolve().name))
        fsync(descriptor)

    def noted_rename(self, target):
        calls.append(("rename", target.name))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    folder = tmp_path / "checkpoints"
    save(folder, 3)
    renamed = calls.index(("rename", "step-00000003"))
    aside = calls[renamed - 1][1]
    assert re.fullmatch(r"\.step-00000003\.[0-9a-f]{16}\.tmp", aside)
    assert {name for _, name in calls[:renamed]} == {*FILES, aside}
    assert calls[renamed + 1 :] == [("sync", "checkpoints")]
