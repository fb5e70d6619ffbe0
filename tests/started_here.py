"""Commands that are started as processes, run in this one: an interpreter takes longer to start than a small run."""

import contextlib
import subprocess
import sys

import pytest

import localprop.bench.runner  # noqa: F401  (its annotations need the true `subprocess.Popen`)
from localprop.cli import main
from localprop.system.commands import interpreter_words

POPEN = subprocess.Popen


class Ended:
    """What `subprocess.Popen` gives of a `localprop` command: one that has run and ended before it is asked."""

    def __init__(self, words, argv, stdout=None):
        self.args = words
        with contextlib.ExitStack() as stack:
            if stdout is not None:
                stack.enter_context(contextlib.redirect_stdout(stdout))
                stack.enter_context(contextlib.redirect_stderr(stdout))
            self.returncode = main(argv)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def poll(self):
        return self.returncode

    def communicate(self, *_, **__):
        return None, None


def popen(words, *, stdout=None, **others):
    """Runs a `localprop` command here; starts any other one as ever."""
    for start in ([sys.executable, "-m", "localprop"], interpreter_words()):
        if list(words[: len(start)]) == start:
            return Ended(words, list(words[len(start) :]), stdout)
    return POPEN(words, stdout=stdout, **others)


@contextlib.contextmanager
def started_here():
    """Inside, `localprop` commands that are started as processes run in this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", popen)
        yield
