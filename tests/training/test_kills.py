"""A run that is killed again and again, in real processes, comes to what it comes to undisturbed."""

import os
import random
import signal
import time

import pytest

from ranks import LONG, assert_same_run, flags, wait_for_step


@pytest.mark.processes
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_ten_times_and_resumed_gives_the_same_weights(forker, alone, tmp_path):
    moments = random.Random(0)
    run = forker.train(tmp_path, 1, *flags(tmp_path, 3, *LONG, "--checkpoint-steps", "2"))
    wait_for_step(tmp_path, 1)
    finished = 0
    for _ in range(10):
        time.sleep(moments.uniform(0.2, 1.2))
        run.kill(0, signal.SIGKILL)
        finished += run.wait() == [0]
        run = forker.train(tmp_path, 1, "--resume", str(tmp_path / "run"))
    assert run.wait() == [0], run.log.read_text()
    assert finished < 5, "most kills must hit a run that is not over yet"
    assert_same_run(tmp_path, alone(3, *LONG))
