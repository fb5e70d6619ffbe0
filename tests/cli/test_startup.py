"""Start-up: help, and the answer to a mistake in a command, take no time and import nothing large."""

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import localprop
from localprop.system.commands import interpreter_words

LARGE = ("torch", "torchvision", "timm", "sklearn", "scipy", "matplotlib", "numpy", "PIL")
SECONDS = 0.7  # of processor time, with the start of the interpreter
RUN = """
import resource, sys
sys.argv[0] = "localprop"
from localprop.cli import main
try:
    code = main()
except SystemExit as stop:  # after a command's --help
    code = stop.code
used = resource.getrusage(resource.RUSAGE_SELF)
print(repr((code, used.ru_utime + used.ru_stime, sorted({name.partition(".")[0] for name in sys.modules}))))
"""


def started(*words):
    """The output of a command, its exit code, its seconds of processor time and the packages that it imported."""
    process = subprocess.run([sys.executable, "-c", RUN, *words], capture_output=True, text=True, check=True)
    *output, last = process.stdout.splitlines()
    return "\n".join(output) + process.stderr, *eval(last)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("--help", 0, "usage: localprop COMMAND"),
        ("--version", 0, f"localprop {localprop.__version__}"),
        ("trian", 2, "did you mean 'train'?"),
        ("train --help", 0, "feature-reconstruction, infopro, greedy, trgl, auglocal, lopt, distance, end-to-end"),
        ("train --lrr 1", 2, "train has no option '--lrr'; did you mean '--lr'?"),
        ("plan --help", 0, "conv, deconv, pixel-shuffle, transformer, infopro"),
        ("chain", 2, "MODEL is missing"),
        ("bench smoke --jbos 2", 2, "did you mean '--jobs'?"),
        ("eval --help", 0, "run folder"),
    ],
)
def test_help_and_mistakes_are_answered_at_once(words, code, said):
    output, exit_code, seconds, packages = started(*words.split())
    assert exit_code == code
    assert said.lower() in " ".join(output.replace("│", " ").split()).lower()
    assert not set(LARGE) & set(packages)
    assert seconds < SECONDS


def test_importing_localprop_imports_no_torch_until_a_name_is_used():
    code = f"""
import sys, localprop
from localprop import LocalpropError, METHODS
import localprop.settings.config, localprop.settings.trust, localprop.bench.suite
assert "localize" in dir(localprop) and list(METHODS)[0] == "feature-reconstruction"
assert not set({LARGE}) & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_all_public_names_can_be_imported_at_once():
    names = {}
    exec("from localprop import *", names)
    assert names.keys() - {"__builtins__"} == set(localprop.__all__)
    assert names["localize"] is localprop.localize is localprop.division.divide.localize


def test_scikit_learn_is_imported_only_where_it_is_used():
    """By the digits and by --val-split: nothing else pays for it."""
    importing = set()
    for path in Path(localprop.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text())
        imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
        found = [node for node in imports if "sklearn" in ast.unparse(node)]
        importing |= {path.stem for _ in found}
        assert not set(found) & set(tree.body), f"{path} imports scikit-learn whenever it is imported"
    assert importing == {"sources", "split"}


def test_peft_is_imported_only_where_adapters_are_asked_for():
    for path in Path(localprop.__file__).parent.rglob("*.py"):
        imports = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        assert not any("peft" in ast.unparse(node) for node in imports), f"{path} imports peft"  # import_extra does


def test_a_name_that_localprop_lacks_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'localprop' has no attribute 'localise'"):
        localprop.localise  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'localise'"):
        from localprop import localise  # noqa: F401


def test_modules_are_found_as_attributes():
    assert localprop.methods.METHODS is localprop.METHODS
    with pytest.deprecated_call():
        sys.modules.pop("localprop.carry", None)
        vars(localprop).pop("carry", None)
        assert localprop.carry.Carry.__module__ == "localprop.network.carry"


@pytest.mark.parametrize(
    "words", ["train --epochs 1", "plan", "chain resnet18", "bench smoke", "eval x", "train --resume"]
)
def test_ctrl_c_while_torch_is_imported_ends_with_one_line(tmp_path, monkeypatch, words):
    here = tmp_path / "here"
    (tmp_path / "torch.py").write_text(f"import pathlib, time\npathlib.Path({str(here)!r}).touch()\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    process = subprocess.Popen(interpreter_words(*words.split()), stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not here.exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "localprop: stopped\n"
    assert process.returncode == 130


def test_a_command_of_our_own_runs_this_very_code_wherever_it_starts(tmp_path):
    origin = "import sys, localprop\nprint(localprop.__file__, [p for p in sys.path if p.endswith('localprop')])"
    program, option, code, *_ = interpreter_words()
    code = code.replace("from localprop.cli import main\nsys.exit(main())\n", origin)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([program, option, code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{localprop.__file__} []\n", done.stderr
