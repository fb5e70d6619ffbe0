"""The examples run from top to bottom, learn, and are short."""

import re
import runpy
import sys
import tempfile

import pytest

from localprop.methods import METHODS
from places import EXAMPLES
from started_here import started_here


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs an example as a script, in this process; returns what it, and the commands it runs, printed."""

    def run_example(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *words])
        with started_here():
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capfd.readouterr().out

    return run_example


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short(path):
    assert len(path.read_text().splitlines()) < 80


def test_own_loop_learns(run):
    accuracies = [float(x) for x in re.findall(r"test ([\d.]+)%", run("own_loop.py", "2"))]
    assert len(accuracies) == 2
    assert accuracies[-1] > 20  # of ten digits, chance gets 10


def test_own_method_learns_in_every_module(run, monkeypatch):
    monkeypatch.setitem(METHODS, "predsim", None)  # so that it is gone again after the test
    lines = run("own_method.py", "3").splitlines()
    accuracies = [float(x) for x in re.findall(r"([\d.]+)%", lines[-1])]
    assert len(accuracies) == 4
    assert min(accuracies) > 20


def test_own_folder_trains_and_loads_into_timm(run, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    printed = run("own_folder.py")
    accuracy = float(re.search(r"([\d.]+)% of 48 test images", printed)[1])
    assert accuracy > 50  # of three shapes, chance gets 33
