"""How processes end is told in a line, and what cannot be started is not; nothing is started here."""

import errno
import re
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from localprop.cli import main
from localprop.errors import ParallelError
from localprop.parallel.children import Children
from localprop.parallel.job import Job, meet
from localprop.system.launched import Ranks, describe_ranks, leave_failure


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE"])
@pytest.mark.parametrize("value", [None, "", "two"])
def test_variables_that_number_processes_must_be_set(tmp_path, monkeypatch, name, value):
    own = {"LOCALPROP_JOB": str(tmp_path), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"} | {name: value}
    for key, given in own.items():
        monkeypatch.setenv(key, given) if given is not None else monkeypatch.delenv(key, raising=False)
    with pytest.raises(ParallelError, match="RANK, LOCAL_RANK and WORLD_SIZE must be set"):
        meet("cpu")


def test_memory_that_runs_out_among_messages_is_not_a_lost_process():
    job = object.__new__(Job)
    with pytest.raises(torch.OutOfMemoryError), job.talking():
        raise torch.OutOfMemoryError("out of memory")
    with pytest.raises(ParallelError, match="rank 3 is gone"), job.talking("rank 3"):
        raise RuntimeError("connection closed")


def ending(monkeypatch, ended, word=None, run=None, saved=True, number=0, ended_by_us=()):
    """Lets processes end so, without starting any."""

    def end(self, command, count, folder):
        monkeypatch.setenv("LOCALPROP_JOB", str(folder))
        checkpoints = folder / "checkpoints"
        if saved:
            (checkpoints / "step-00000001").mkdir(parents=True)
        if run:
            describe_ranks(Ranks(["module 1 of 2: a", "module 2 of 2: b"], str(run), str(checkpoints)))
        if word:
            assert leave_failure(word)
        self.ended, self.signal, self.ended_by_us = ended, number, set(ended_by_us)

    monkeypatch.setattr(Children, "run", end)


TWO = ["train", "--modules", "2", "--parallel", "modules", "--nproc", "2"]


LOST = "rank 1 ends: rank 0 is gone"


KILLED = "rank 1 (module 2 of 2: b) was killed by SIGKILL (by hand, or because memory ran out)"


@pytest.mark.parametrize(
    ("ended", "more", "code", "line"),
    [
        ([(0, 0), (1, 0)], {}, 0, ""),
        ([(0, 1), (1, 1)], {"word": LOST}, 2, LOST),
        ([(1, -9), (0, 1)], {"word": LOST}, 2, "rank 1 was killed by SIGKILL (by hand, or because memory ran out)"),
        ([(0, 1), (1, -11)], {}, 2, "rank 1 was killed by SIGSEGV before training began"),
        ([(0, 1), (1, -9)], {"run": Path("runs/my run"), "word": LOST}, 2, f"{KILLED}; resume with: localprop train"),
        ([(1, -9)], {"run": Path("runs/my run"), "saved": False}, 2, f"{KILLED}; resume with: localprop train"),
        ([(1, 2), (0, 1)], {}, 2, ""),  # that process has said why
        ([(1, 141), (0, 143)], {}, 141, ""),  # the other was ended because of it
        ([(1, 2), (0, -9)], {"ended_by_us": [0]}, 2, ""),
        ([(1, 1), (0, -9)], {"word": LOST, "ended_by_us": [0]}, 2, LOST),
        # The other was ended while it decoded images.
        (
            [(1, -9), (0, 143)],
            {"ended_by_us": [0]},
            2,
            "rank 1 was killed by SIGKILL (by hand, or because memory ran out)",
        ),
        ([(0, 143), (1, 143)], {"number": signal.SIGTERM}, 143, ""),
        ([(0, -15), (1, -15)], {"number": signal.SIGINT}, 130, "stopped"),  # before training
        ([(0, 2), (1, 143)], {"number": signal.SIGTERM}, 2, ""),  # its checkpoint could not be saved
        ([(0, 0), (1, 0)], {"number": signal.SIGTERM}, 0, ""),  # it came too late
    ],
)
def test_how_processes_end_is_told_in_a_line(monkeypatch, capsys, ended, more, code, line):
    ending(monkeypatch, ended, **more)
    assert main(TWO) == code
    told = capsys.readouterr().err
    assert told.startswith(f"localprop: {line}") if line else told == ""
    assert told.count("\n") == bool(line)
    if "run" in more:  # it can be pasted
        anew = "" if more.get("saved", True) else ", which starts anew: there is no checkpoint yet"
        assert told.endswith(f"--resume 'runs/my run'{anew}\n")


def test_processes_that_cannot_be_started_are_told_in_a_line(monkeypatch, capsys):
    ended = []

    class First:
        def __init__(self, words, env, **_):
            if env["RANK"] == "1":
                raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

        def kill(self):
            ended.append(0)

        def wait(self):
            return -9

    monkeypatch.setattr(subprocess, "Popen", First)
    assert main(TWO) == 2
    line = "localprop: process 2 of 2 cannot be started (Resource temporarily unavailable); start fewer\n"
    assert capsys.readouterr().err == line
    assert ended == [0]


@pytest.fixture
def no_processes(monkeypatch):
    monkeypatch.setattr(Children, "run", lambda *_: pytest.fail("it started processes"))


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--modules", "2", "--parallel", "modules"], "3 replicas; take --batch-size 33"),
        (["--micro-batches", "2", "--parallel", "data"], "6 replicas of 2 micro-batches; take --batch-size 36"),
    ],
)
def test_a_batch_that_replicas_cannot_share_starts_no_processes(flags, wanted, no_processes, capsys):
    assert main(["train", *flags, "--batch-size", "32", "--nproc", "6"]) == 2
    line = capsys.readouterr().err
    assert f"--batch-size 32 does not divide equally into {wanted}" in line
    assert line.count("\n") == 1


def test_a_run_folder_that_exists_starts_no_processes(tmp_path, no_processes, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    own = ["--output", str(tmp_path), "--experiment", "run", "--modules", "2"]
    assert main(["train", *own, "--parallel", "modules", "--nproc", "2"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.endswith(
        f"/run exists already; choose another --experiment, or resume it: localprop train --resume {tmp_path}/run\n"
    )


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there are two GPUs")
def test_a_gpu_for_each_process_is_looked_for_before_they_start(no_processes, capsys):
    assert main(["train", "--modules", "2", "--device", "cuda", "--parallel", "modules", "--nproc", "2"]) == 2
    line = capsys.readouterr().err
    assert re.fullmatch(r"localprop: process 2 on this machine has no GPU, there are [01]; start fewer, .*\n", line)


@pytest.mark.parametrize("shared", [["--modules", "2"], ["--cuts", "layers.0"], []])
def test_processes_that_cannot_share_the_modules_are_not_started(shared, no_processes, capsys):
    count = 3 if shared else 5
    assert main(["train", *shared, "--parallel", "modules", "--nproc", str(count)]) == 2
    line = capsys.readouterr().err
    most = count - 1
    assert (
        f"{count} processes cannot share {most} modules; take at most {most}, or a multiple such as {2 * most}" in line
    )
    assert line.count("\n") == 1
