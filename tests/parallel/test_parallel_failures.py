"""Processes that fail, are killed or cannot be: one line each, nothing left, and how it goes on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from places import FIXTURES
from ranks import CALM, LONG, MODULES, SECONDS, assert_same_run, flags, wait_for_step

pytestmark = [pytest.mark.processes, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


def test_a_killed_process_ends_all_and_the_job_started_again_goes_on(forker, alone, tmp_path):
    settings = flags(tmp_path, 3, *LONG)
    ranks = forker.train(tmp_path, 3, *settings, attempt=0)
    wait_for_step(tmp_path, 5)
    ranks.kill(1, signal.SIGKILL)
    before = time.monotonic()
    assert ranks.wait() == [1, -signal.SIGKILL, 1]
    assert time.monotonic() - before < 30
    # No path of gloo's code.
    line = r"localprop: rank [02] ends: [\w ]+ is gone \([^/\n]*\); it was killed[^/\n]*; "
    line += r"resume with: localprop train --resume \S+/run\n"
    assert re.fullmatch(line, ranks.log.read_text())
    again = forker.train(tmp_path, 3, *settings, attempt=1)
    assert again.wait() == [0, 0, 0], again.log.read_text()
    assert_same_run(tmp_path, alone(3, *LONG))


def test_a_job_started_again_leaves_other_runs_alone(forker, tmp_path):
    """torchrun calls many jobs "none": what another of that name did is not to be gone on with."""
    settings = [*CALM, "--cuts", *MODULES[2], "--output", str(tmp_path)]
    assert forker.train(tmp_path, 2, *settings, attempt=0).wait() == [0, 0]
    (other,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert json.loads((other / "run.json").read_text())["job"] == "a job"
    before = (other / "model.safetensors").read_bytes()
    assert forker.train(tmp_path, 2, *settings, "--seed", "7", attempt=1).wait() == [0, 0]
    assert (other / "model.safetensors").read_bytes() == before
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2


def test_a_job_takes_an_empty_folder_of_its_name(forker, tmp_path):
    (tmp_path / "run").mkdir()
    settings = [*CALM, "--cuts", *MODULES[2], "--output", str(tmp_path), "--experiment", "run"]
    assert forker.train(tmp_path, 2, *settings).wait() == [0, 0]
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert "job" not in json.loads((tmp_path / "run" / "run.json").read_text())  # which names torchrun's


def test_no_process_resumes_on_other_data(forker, tmp_path):
    run = Path(shutil.copytree(FIXTURES / "run-0.1", tmp_path / "run"))
    description = json.loads((run / "run.json").read_text())
    identity = {"source": "digits", "classes": description["classes"], "train_images": 1437, "evaluated_images": 359}
    (run / "run.json").write_text(json.dumps(description | {"data_identity": identity}))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    ranks = forker.train(tmp_path, 2, "--resume", str(run))
    assert set(ranks.wait()) == {2}
    line = f"localprop: the data are not those of {run}: evaluated images: 359 then, 360 now; "
    assert ranks.log.read_text() == f"{line}restore them, or start a new run\n"
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_loss_that_is_not_finite_ends_all_with_one_line(forker, tmp_path):
    words = ["--epochs", "2", "--lr", "1e30", "--sched", "none", "--reach", "0"]
    ranks = forker.train(tmp_path, 2, *flags(tmp_path, 2, *words))
    assert sorted(ranks.wait()) == [1, 2]
    assert re.fullmatch(
        r"localprop: rank 0: the loss of module 1 of 2 \(.*\) is nan at step 2.*\n", ranks.log.read_text()
    )


def test_the_launcher_says_who_was_killed_and_leaves_nothing(tmp_path):
    command = [sys.executable, "-m", "localprop", "train", *flags(tmp_path, 2, "--epochs", "400")]
    process = subprocess.Popen(
        [*command, "--parallel", "modules", "--nproc", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_step(tmp_path, 5)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(children) == 2
    os.kill(children[1], signal.SIGKILL)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 2
    line = r"localprop: rank 1 \(module 2 of 2: layers\.1 \.\.\. head\) was killed by SIGKILL .* --resume \S+/run\n"
    assert re.fullmatch(line, error)
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


def test_a_reader_that_has_read_enough_is_no_error(tmp_path):
    command = [sys.executable, "-m", "localprop", "train", *flags(tmp_path, 2, "--epochs", "1")]
    command += ["--parallel", "modules", "--nproc", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "starting 2 processes\n"
    process.stdout.close()
    assert process.wait(timeout=SECONDS) == 141
    assert process.stderr.read() == ""
    process.stderr.close()
