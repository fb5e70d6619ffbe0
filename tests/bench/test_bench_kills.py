"""A bench that is killed or stopped, in real processes, and called again."""

import fcntl
import signal
import subprocess
import sys
import time

import pytest

from localprop.bench.record import read_record
from localprop.cli import main
from started_here import started_here

SUITE = """
description: A run that lasts long enough to be killed twice.
settings:
  model_kwargs: {patch_size: 4, window_size: 2, embed_dim: 12, depths: [1, 1], num_heads: [1, 2], drop_path_rate: 0.2}
  min_depth: 0
  batch_size: 256
  epochs: 16
  val_interval: 16
  checkpoint_steps: 3
runs:
  - {method: greedy, modules: 3}
  - {method: end-to-end}
"""
RUN = "greedy-k3"
STEPS = 16 * 5


@pytest.mark.processes
def test_killed_or_stopped_and_called_again_gives_the_same_results(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    suite, killed, whole = tmp_path / "one.yaml", tmp_path / "killed", tmp_path / "whole"
    suite.write_text(SUITE)
    only = ["bench", str(suite), "--only", RUN, "--output"]
    command = [sys.executable, "-m", "localprop", *only, str(killed)]
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 128 + signal.SIGTERM)):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as bench:
            seen = steps_of(killed)
            while steps_of(killed) <= seen:
                assert bench.poll() is None, "it ended before a checkpoint came"
                time.sleep(0.02)
            bench.send_signal(number)
            output = bench.stdout.read()
        assert bench.returncode == code
        said = "1 of 1 runs are not finished; the same command continues with them"
        assert (said in output) == (number == signal.SIGTERM)
        wait_for_the_lock(killed)
    assert 0 < steps_of(killed) < STEPS, "the kills must hit a run that is not over"
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    with started_here():
        assert main([*only, str(whole)]) == 0
    results = [read_record(folder / f"{RUN}.json").result for folder in (killed, whole)]
    assert results[0] == results[1]


def steps_of(folder):
    found = [int(path.name.removeprefix("step-")) for path in folder.glob(f"runs/{RUN}/checkpoints/step-????????")]
    return max(found, default=0)


def wait_for_the_lock(folder):
    """Until the run whose bench was killed has saved its checkpoint and ended: it keeps others out so long."""
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
