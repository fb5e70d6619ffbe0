"""What tests of several files share.

torch is imported by those who need it: with several processes (`-n`), the one that hands out tests does without.
"""

import gc
import subprocess
import sys

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Every test computes in one thread: roundings are the same on every machine, and a fork loses no threads."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def imported_for_good():
    """What has been imported lives to the end: the garbage collector, which a measurement calls, skips it."""
    import localprop.cli  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def tables_as_before():
    """No test leaves a method, head, decoder, task, dataset or model to the next one."""
    from localprop.registry import DATASETS, DECODERS, HEADS, METHODS, MODELS, TASKS

    tables = [(table, set(table)) for table in (METHODS, HEADS, DECODERS, TASKS, DATASETS, MODELS)]
    yield
    for table, names in tables:
        for name in set(table) - names:
            del table[name]


@pytest.fixture(scope="session")
def forker():
    """A process that has imported everything and starts others by forking."""
    from ranks import FORKER, Forker

    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", FORKER], **pipes) as process:
        yield Forker(process)
        process.stdin.close()


@pytest.fixture(scope="session")
def alone(forker, tmp_path_factory):
    """Gives the output folder of a finished run in one process, by its flags."""
    from ranks import flags

    done = {}

    def get(modules, *more):
        if (modules, more) not in done:
            output = tmp_path_factory.mktemp("alone")
            assert forker.train(output, 1, *flags(output, modules, *more)).wait() == [0]
            done[modules, more] = output
        return done[modules, more]

    return get
