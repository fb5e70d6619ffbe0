"""The processes that decode images: they end when the one that trains does, and not before."""

import os
import select
import signal
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from localprop.data.images import decoding
from localprop.data.images.decoding import read_images, small_sizes
from localprop.data.images.walk import File
from localprop.data.images.workers import batches_of
from localprop.data.loading import load_data
from localprop.errors import DataError
from localprop.settings.config import DataConfig

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def draw(root: Path, side: int, count: int = 8) -> Path:
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (side, side), (number, 0, 0)).save(root / part / name / f"{number:03}.png")
    return root


def load(root: Path, workers: int = 2):
    return load_data(DataConfig(data=f"folder:{root}", workers=workers), 16, 0)


@pytest.fixture
def large(tmp_path):
    return draw(tmp_path / "pets", 100)


# Each case is a process of its own, forked from one that has imported everything.
CASES = """
import os, signal, sys, time
from multiprocessing import active_children
from localprop.data.images import streaming
from localprop.settings.config import DataConfig
from localprop.data.loading import load_data

def start(hang):
    data = load_data(DataConfig(data="folder:" + sys.argv[1], workers=2), 16, 0)
    read = streaming.read_image
    def slow(path):
        if hang and "dog" in path:
            time.sleep(600)
        return read(path)
    streaming.read_image = slow
    batches = data.test_batches(2, "cpu")
    next(batches)
    print(*(child.pid for child in active_children()), flush=True)
    return batches

for line in sys.stdin:
    if os.fork() == 0:
        batches = start(hang=True)
        if line.strip() == "sleep":
            time.sleep(600)
        raise ZeroDivisionError
    print(os.wait()[1], flush=True)
"""


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    root = draw(tmp_path_factory.mktemp("cases") / "pets", 100)
    command = [sys.executable, "-c", CASES, str(root)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        yield process
        process.kill()


def are_gone(workers: list[int], seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        # A worker whose parent is gone may stay a zombie where nothing collects it.
        states = [Path(f"/proc/{pid}/stat") for pid in workers]
        if all(not path.exists() or path.read_text().rpartition(")")[2].split()[0] == "Z" for path in states):
            return True
        time.sleep(0.05)
    return False


def answer(cases, seconds: float = 60) -> str:
    assert select.select([cases.stdout], [], [], seconds)[0], "a process hangs"
    return cases.stdout.readline()


def start(cases, line: str) -> list[int]:
    print(line, file=cases.stdin, flush=True)
    workers = [int(word) for word in answer(cases).split()]
    assert len(workers) == 2
    return workers


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
def test_after_an_unexpected_error_the_process_ends_and_so_do_workers_that_hang(cases):
    workers = start(cases, "raise")
    # At once; but there may be much else to do on this machine.
    assert os.waitstatus_to_exitcode(int(answer(cases))) == 1
    assert are_gone(workers)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no PYTHONSAFEPATH")
def test_interpreters_of_workers_run_no_code_of_the_current_folder(tmp_path, monkeypatch):
    """multiprocessing starts them so where it does not fork, and gives them the path of this process afterwards."""
    monkeypatch.chdir(tmp_path)
    Path("pickle.py").write_text("open('ran', 'w')")
    environment = dict(os.environ)

    class Loader:
        num_workers = 1

        def __iter__(self):
            subprocess.run([sys.executable, "-c", "from multiprocessing import spawn"], check=True)
            return iter([])

    assert list(batches_of(Loader())) == []
    assert not Path("ran").exists()
    assert dict(os.environ) == environment


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel of Linux alone ends them")
def test_workers_end_with_a_process_that_is_killed(cases):
    workers = start(cases, "sleep")
    parent = int(Path(f"/proc/{workers[0]}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(parent, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(int(answer(cases))) == -signal.SIGKILL
    assert are_gone(workers)


def test_workers_leave_signals_to_the_process_that_trains(large):
    """torchrun, and a terminal, send them to the whole group."""
    reference = list(load(large, 0).test_batches(2, "cpu"))
    batches = load(large).test_batches(2, "cpu")
    found = [next(batches)]
    for number in (signal.SIGTERM, signal.SIGINT):
        for worker in active_children():
            os.kill(worker.pid, number)
    found += batches
    assert all(torch.equal(a[0], b[0]) for a, b in zip(reference, found, strict=True))


def test_a_killed_worker_is_one_line_where_its_batch_is_asked_for(large):
    handler = signal.getsignal(signal.SIGCHLD)
    batches = load(large).test_batches(2, "cpu")
    next(batches)
    worker = min(active_children(), key=lambda process: process.pid)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()  # and no error is raised here, where a checkpoint may be being saved
    with pytest.raises(DataError) as caught:
        list(batches)
    assert f"(pid {worker.pid}) was killed; " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert signal.getsignal(signal.SIGCHLD) == handler
    assert active_children() == []


def test_batches_that_are_no_longer_wanted_leave_no_worker(large):
    batches = load(large).train_batches(0, 2, "cpu")
    next(batches)
    assert len(active_children()) == 2
    batches.close()
    assert active_children() == []


def test_ctrl_c_waits_for_no_more_than_the_images_being_decoded(tmp_path, monkeypatch):
    root, read, seen = draw(tmp_path / "pets", 8, 200), decoding.read_image, []

    def interrupt(path):
        seen.append(path)
        if len(seen) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.005)
        return read(path)

    monkeypatch.setattr(decoding, "read_image", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load(root)
    assert len(seen) < 100


@pytest.fixture
def mixed(tmp_path, monkeypatch):
    """600 small images, of two sizes and modes, some damaged; few enough for a test, and many enough for processes."""
    monkeypatch.setattr(decoding, "_FILES_PER_PROCESS", 100)
    monkeypatch.setattr(decoding, "_cores", lambda: 2)
    rng = np.random.default_rng(0)
    files = []
    for number in range(600):
        side, path = 20 + number % 3, tmp_path / f"{number:03}.{'jpg' if number % 2 else 'png'}"
        image = Image.fromarray(rng.integers(256, size=(side, side, 3), dtype=np.uint8))
        (image.convert("L") if number % 5 == 0 else image).save(path)
        files.append(File(str(path), number % 7))
    for number in (3, 130, 131, 599):
        Path(files[number].path).write_bytes(b"damaged")
    return files


@pytest.mark.parametrize("side", [20, None])
def test_processes_decode_the_same_pixels_in_the_same_order(mixed, side):
    found = []
    for in_processes in (False, True):
        bad = []
        images, labels = read_images(mixed, side, lambda one, bad=bad: bad.append(one), in_processes)
        assert active_children() == []
        found.append((list(images), labels, bad, small_sizes(mixed, in_processes)))
    alone, others = found
    assert all(torch.equal(a, b) for a, b in zip(alone[0], others[0], strict=True))
    assert len(alone[0]) == 596
    assert torch.equal(alone[1], others[1])
    assert alone[2:] == others[2:]
    assert [one.path for one in alone[2]] == [mixed[number].path for number in (3, 130, 131, 599)]
    assert alone[3] == {(20, 20), (21, 21), (22, 22)}


def test_after_an_error_no_process_keeps_decoding(mixed):
    def refuse(bad):
        assert len(active_children()) == 2
        raise DataError(bad.problem)

    with pytest.raises(DataError, match=r"003\.jpg is unreadable"):
        read_images(mixed, 20, refuse)
    assert active_children() == []


def test_a_killed_process_is_one_line_while_images_are_decoded(mixed):
    def kill(bad):
        for worker in active_children():
            os.kill(worker.pid, signal.SIGKILL)

    with pytest.raises(DataError, match=r"a process that decodes images \(pid [\d, ]+\) was killed; "):
        read_images(mixed * 30, 20, kill)
    assert active_children() == []


def test_sigterm_leaves_no_process_and_no_folder_while_images_are_decoded(mixed):
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    def end(bad):
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as stop:  # which lets Python remove what multiprocessing has made
        read_images(mixed, 20, end)
    assert stop.value.code == 128 + signal.SIGTERM
    assert active_children() == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_without_workers_no_process_is_started(mixed, monkeypatch):
    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter", pytest.fail)
    monkeypatch.setattr("localprop.data.images.workers.get_temp_dir", pytest.fail)  # a folder that nobody needs
    _, labels = read_images(mixed[:200], 20, lambda bad: None, in_processes=False)
    assert len(labels) == 197


def test_a_temporary_folder_with_too_long_a_name_is_told_instead_of_waiting_for_ever(large, monkeypatch):
    monkeypatch.setattr("localprop.data.images.workers.get_temp_dir", lambda: "/tmp/" + 90 * "x")
    with pytest.raises(DataError, match="set TMPDIR to a folder with a shorter name, or pass --workers 0"):
        next(load(large).test_batches(2, "cpu"))
    assert len(next(load(large, workers=0).test_batches(2, "cpu"))[1]) == 2
