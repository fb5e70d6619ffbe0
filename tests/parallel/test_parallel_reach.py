"""Heads that read ahead into another process: real processes against the same run in one process."""

import os

import pytest

from ranks import assert_same_run, flags

pytestmark = [pytest.mark.processes, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


def reaching(output, modules, reach, *more):
    return flags(output, modules, "--reach", str(reach), *more)


# In four modules the last has no block: the third's head reads its own output.
@pytest.mark.parametrize(
    ("modules", "processes", "reach", "more"),
    [
        (2, 2, 1, ["--micro-batches", "4", "--kinetic", "0.1", "--epochs", "2"]),
        (3, 3, 1, ["--method", "greedy", "--epochs", "1"]),
        (4, 4, 2, ["--amp", "--amp-dtype", "bfloat16", "--epochs", "1"]),
        (3, 2, 2, ["--micro-batches", "2", "--epochs", "1"]),
    ],
)
def test_heads_read_ahead_into_another_process_with_the_same_bits(
    forker, alone, tmp_path, modules, processes, reach, more
):
    ranks = forker.train(tmp_path, processes, *reaching(tmp_path, modules, reach, *more))
    assert ranks.wait() == [0] * processes, ranks.log.read_text()
    assert_same_run(tmp_path, alone(modules, "--reach", str(reach), *more))
