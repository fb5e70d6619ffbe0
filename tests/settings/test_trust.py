"""What a stranger's file of settings, suite or run folder decides, and what only the command line does."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

from localprop.bench.runner import Runner
from localprop.bench.suite import load_suite
from localprop.cli import main
from localprop.errors import ConfigError
from localprop.runs.recorded_settings import read_config
from localprop.settings.trust import require_typed, without_starting_weights
from localprop.system import commands
from localprop.system.plugins import load_plugin
from places import FIXTURES

FIXTURE = FIXTURES / "run-0.1"
SMALL = "{patch_size: 4, window_size: 2, embed_dim: 8, depths: [1, 1], num_heads: [1, 2]}"


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    for name in [name for name in sys.modules if name.startswith("localprop_plugin_")]:
        del sys.modules[name]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def code(here):
    """A stranger's plugin; `ran` tells whether its code has run."""
    path = here / "their code.py"
    path.write_text(f"from pathlib import Path\nPath({str(here / 'ran')!r}).touch()\n")
    return path


@pytest.fixture
def run(here):
    return Path(shutil.copytree(FIXTURE, here / "their run"))


def change(run, **settings):
    path = run / "config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **settings}))


def refused(words, capsys):
    """Runs a command, which has to fail with one line; gives the command that the line says to type."""
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("localprop: ")
    return shlex.split(error.partition("type: localprop ")[2])


@pytest.mark.parametrize("words", [["eval"], ["export"], ["train", "--resume"]], ids=" ".join)
def test_a_run_folder_does_not_choose_code(run, code, capsys, words):
    change(run, plugin=str(code))
    typed = refused([*words, str(run)], capsys)
    assert typed == [*words, str(run), "--plugin", str(code)]
    assert not (run.parent / "ran").exists()
    # A folder of version 0.1 does not know which code it was: what the user names is taken, and that is said.
    change(run, epochs=3 if "train" not in words else 2, model="none")  # the code has run, and nothing needs to train
    assert main(typed) == 2
    assert "does not record the SHA-256 of its plugin" in capsys.readouterr().err
    assert (run.parent / "ran").exists()


def test_the_code_of_a_run_is_that_which_it_was_trained_with(run, code, capsys):
    description = json.loads((run / "run.json").read_text())
    digest = hashlib.sha256(code.read_bytes()).hexdigest()
    change(run, plugin="elsewhere.py")
    (run / "run.json").write_text(json.dumps({**description, "plugin": {"path": "elsewhere.py", "sha256": digest}}))
    assert main(["export", str(run), "--plugin", str(code)]) == 0  # wherever it lies now
    assert "plugin" not in capsys.readouterr().err
    nothing = code.with_name("other.py")
    nothing.write_text(code.read_text() + "\n")
    (run.parent / "ran").unlink()
    assert main(["eval", str(run), "--plugin", str(nothing)]) == 2
    assert "other.py is not the file that the run was trained with (SHA-256 " in capsys.readouterr().err
    assert not (run.parent / "ran").exists()


def test_a_run_records_the_code_that_ran(here, code, capsys):
    flags = ["--model-kwargs", "patch_size=4", "window_size=2", "embed_dim=8", "depths=(1,1)", "num_heads=(1,2)"]
    flags += ["--method", "end-to-end", "--epochs", "1", "--batch-size", "512", "--device", "cpu"]
    assert main(["train", *flags, "--plugin", str(code), "--experiment", "run"]) == 0
    record = json.loads(Path("runs/run/run.json").read_text())["plugin"]
    assert record == {"path": str(code), "sha256": hashlib.sha256(code.read_bytes()).hexdigest()}
    printed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("localprop eval"))
    assert main(shlex.split(printed)[1:]) == 0
    assert refused(["eval", "runs/run"], capsys) == ["eval", "runs/run", "--plugin", str(code)]


def test_what_is_hashed_is_what_runs(here):
    """Not bytecode beside it, which Python takes for the file's if their times agree."""
    path = here / "mine.py"
    path.write_text("value = 1\n")
    os.utime(path, (1, 1))
    import py_compile

    py_compile.compile(str(path))
    path.write_text("value = 2\n")
    os.utime(path, (1, 1))
    load_plugin(path, hashlib.sha256(b"value = 2\n").hexdigest())
    assert sys.modules["localprop_plugin_mine"].value == 2


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_file_of_settings_does_not_choose_code(here, code, capsys, command):
    Path("theirs.yaml").write_text(f"plugin: {code}\nmodel: none\n")
    typed = refused([command, "-c", "theirs.yaml"], capsys)
    assert typed == [command, "-c", "theirs.yaml", "--plugin", str(code)]
    assert not Path("ran").exists()
    assert main(typed) == 2
    assert "no model is called 'none'" in capsys.readouterr().err
    assert Path("ran").exists()


def test_a_suite_does_not_choose_code(here, code, capsys, monkeypatch):
    Path("theirs.yaml").write_text(f"settings: {{plugin: {code}, method: theirs}}\nruns: [{{modules: 2}}]")
    started = []
    monkeypatch.setattr(Runner, "_start", lambda self, job, *_: started.append(job) or setattr(job, "state", "done"))
    assert main(["bench", "theirs.yaml", "--list"]) == 0  # which runs nothing
    typed = refused(["bench", "theirs.yaml"], capsys)
    assert typed == ["bench", "theirs.yaml", "--plugin", str(code)]
    assert not started
    assert not Path("bench").exists()
    Runner(load_suite("theirs.yaml"), here / "out", plugins=[code]).run(lambda jobs: None)
    assert [job.run.config.backbone.plugin for job in started] == [code]
    assert not Path("ran").exists()


HOSTILE = [
    {"model_kwargs": {"checkpoint_path": "/home/me/weights.pth"}},
    {"model_kwargs": {"pretrained_cfg": {"url": "https://example.org/x.pth"}}},
    {"model_kwargs": {"pretrained_cfg_overlay": {"file": "x.npz", "custom_load": True}}},
    {"model_kwargs": {"cache_dir": "x"}},
    {"model_kwargs": {"pretrained_filter_fn": "x"}},
    {"model_kwargs": {"teacher": ["small", {"weights": "../x.pth"}]}},
    {"output": "/home/me"},
    {"output": "runs/../../me"},
    {"output": "~/me"},
    {"experiment": "../me"},
    {"experiment": "/home/me/run"},
    {"download": True, "data_dir": "/home/me/.config"},
    {"resume": "their run"},
]


@pytest.mark.parametrize("settings", HOSTILE, ids=str)
def test_a_file_does_not_choose_weights_or_other_places(here, capsys, settings):
    Path("theirs.yaml").write_text(yaml.safe_dump({**settings, "model": "none"}))
    typed = refused(["train", "-c", "theirs.yaml"], capsys)
    assert typed[:3] == ["train", "-c", "theirs.yaml"]
    assert list(here.iterdir()) == [here / "theirs.yaml"]
    # What the line says to type is taken as it is.
    if "resume" not in settings:
        assert main(typed) == 2
        assert "no model is called 'none'" in capsys.readouterr().err
    if not {"output", "experiment", "resume"} & set(settings):  # which no suite may set
        Path("suite.yaml").write_text(yaml.safe_dump({"settings": {**settings, "epochs": 1}, "runs": [{}]}))
        typed = refused(["bench", "suite.yaml", "--list"], capsys)
        assert main(typed) == 0


def test_what_a_line_says_to_type_keeps_what_was_typed(here, code, capsys):
    other = here / "mine.py"
    other.touch()
    settings = "model: none, data_dir: /, download: true, model_kwargs: {checkpoint_path: /x}"
    Path("theirs.yaml").write_text(f"settings: {{{settings}, plugin: {code}}}\nruns: [{{}}]")
    own = ["bench", "theirs.yaml", "--set", "lr=1", "seed=3", "--jobs", "1"]
    once = refused(own, capsys)
    assert once[:4] == ["bench", "theirs.yaml", "--jobs", "1"]
    assert once[4:] == ["--set", "lr=1", "seed=3", "model_kwargs={'checkpoint_path': '/x'}", "--data-dir", "/"]
    assert main([*once, "--list"]) == 0
    twice = refused([*once, "--plugin", "mine.py"], capsys)
    assert twice == [*once, "--plugin", "mine.py", str(code)]
    assert refused([*once, "--plugin=mine.py"], capsys) == twice


def test_what_a_file_may_not_choose_is_said(here, capsys):
    for settings, what in [
        ({"output": "/x"}, "where results are written (output: /x)"),
        ({"plugin": "x.py"}, "which code runs (plugin: x.py)"),
        ({"model_kwargs": {"checkpoint_path": "/x"}}, "which weights are loaded (model_kwargs: {"),
        ({"data_dir": "/x", "download": True}, "where data are written (data_dir: /x)"),
    ]:
        Path("theirs.yaml").write_text(yaml.safe_dump(settings))
        assert main(["train", "-c", "theirs.yaml"]) == 2
        assert f"theirs.yaml: a file may not choose {what}" in capsys.readouterr().err


def test_a_file_does_not_choose_weights_to_start_from(here, run, capsys):
    for settings in ({"initial_checkpoint": "/x.pth"}, {"model": "local-dir:/x"}, {"model": "hf-hub:them/x"}):
        Path("theirs.yaml").write_text(yaml.safe_dump(settings))
        ((name, value),) = settings.items()
        typed = refused(["train", "-c", "theirs.yaml"], capsys)
        assert typed[-2:] == [f"--{name.replace('_', '-')}", value]
        Path("suite.yaml").write_text(yaml.safe_dump({"settings": settings, "runs": [{}]}))
        typed = refused(["bench", "suite.yaml", "--list"], capsys)
        assert typed[-2:] == ["--set", f"{name}={value!r}"]
        assert main(typed) == 0
    shutil.rmtree(run / "checkpoints")
    (run / "results.csv").unlink()
    change(run, initial_checkpoint="/x.pth")
    assert refused(["train", "--resume", str(run)], capsys)[-2:] == ["--initial-checkpoint", "/x.pth"]


def test_plan_writes_no_file_that_a_file_names(here, capsys):
    for settings in ({"json": "setup.json"}, {"picture": "logo.png"}):
        Path("theirs.yaml").write_text(yaml.safe_dump(settings))
        name, value = next(iter(settings.items()))
        assert refused(["plan", "-c", "theirs.yaml"], capsys)[-2:] == [f"--{name}", value]


HARMLESS = [
    {"model_kwargs": {"drop_path_rate": 0.1, "act_layer": "gelu", "pretrained_window_sizes": [0, 0], "depths": [2, 2]}},
    {"output": "runs/mine"},
    {"experiment": "group/name"},
    {"data_dir": "/data"},
    {"download": True, "data_dir": "data"},
]


@pytest.mark.parametrize("settings", HARMLESS, ids=str)
def test_everything_else_is_a_files_to_decide(settings):
    require_typed(settings, "mine.yaml", ["train", "-c", "mine.yaml"])


def test_what_is_typed_is_meant():
    for settings in HOSTILE:
        flags = [f"--{name.replace('_', '-')}=x" for name in settings]
        require_typed(settings, "theirs.yaml", ["train", *flags])
    with pytest.raises(ConfigError):
        require_typed({"plugin": "x.py"}, "theirs.yaml", ["train", "--plug", "--no-plugin", "plugin"])


def test_weights_to_start_from_are_not_loaded_where_a_run_has_its_own(run, capsys):
    weights = run.parent / "start.safetensors"
    save_file({"head.fc.bias": torch.full((10,), 9.0)}, weights)
    kwargs = yaml.safe_load((run / "config.yaml").read_text())["model_kwargs"]
    start = {
        "checkpoint_path": "/nowhere/weights.pth",
        "cache_dir": "/nowhere",
        "pretrained_cfg_overlay": {"file": "/nowhere/x.npz", "url": "https://example.org", "custom_load": True},
    }
    change(run, model_kwargs={**kwargs, **start})
    description = json.loads((run / "run.json").read_text())
    description["model_kwargs"] |= start
    (run / "run.json").write_text(json.dumps(description))
    assert main(["eval", str(run), "--device", "cpu"]) == 0
    assert main(["export", str(run)]) == 0
    exported = (run / "export" / "config.json").read_text()
    assert "nowhere" not in exported
    assert "example.org" not in exported
    timm.create_model(f"local-dir:{run / 'export'}", pretrained=True)
    kept = without_starting_weights({**kwargs, **start})
    assert kept == {**kwargs, "pretrained_cfg_overlay": {}}


def test_a_run_that_starts_anew_loads_no_weights_that_its_files_name(run, capsys):
    shutil.rmtree(run / "checkpoints")
    (run / "results.csv").unlink()
    kwargs = yaml.safe_load((run / "config.yaml").read_text())["model_kwargs"]
    change(run, model_kwargs={**kwargs, "checkpoint_path": "/nowhere/weights.pth"})
    typed = refused(["train", "--resume", str(run)], capsys)
    assert "checkpoint_path=/nowhere/weights.pth" in typed


def test_a_run_folder_decides_no_place_and_starts_no_processes(run, capsys):
    change(run, output="/nowhere", experiment="../x", download=True, data_dir="/nowhere")
    assert main(["eval", str(run), "--device", "cpu"]) == 0
    assert not Path("/nowhere").exists()
    assert read_config(run).data.download is False
    capsys.readouterr()
    for setting in ({"nproc": 1000, "parallel": "modules"}, {"resume": "x"}):
        other = Path(shutil.copytree(FIXTURE, run.parent / f"other {len(setting)}"))
        change(other, **setting)
        assert main(["train", "--resume", str(other)]) == 2
        assert "is not what a run is, only where it runs; remove that" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["bench", "suite.yaml"], ["train", "--data", "folder:nothing", "--parallel", "data", "--nproc", "1"]],
    ids=["bench", "nproc"],
)
def test_processes_run_no_code_of_the_current_folder(here, capfd, words):
    for name in ("tyro", "torch", "timm", "localprop", "importlib"):
        Path(f"{name}.py").write_text("from pathlib import Path\nPath('ran').touch()\nraise SystemExit(5)\n")
    Path("suite.yaml").write_text("settings: {data: cifar10, data_dir: nothing}\nruns: [{method: greedy}]")
    assert main(words) == 2
    assert not Path("ran").exists()
    assert "nothing" in capfd.readouterr().err  # the process came as far as its data


def test_a_process_runs_the_code_of_the_one_that_starts_it(here, monkeypatch):
    package = here / "elsewhere" / "localprop"
    package.mkdir(parents=True)
    package.joinpath("__init__.py").touch()
    package.joinpath("cli.py").write_text("import sys\ndef main():\n    print(*sys.argv)\n    return 7\n")
    monkeypatch.setattr(commands, "_PACKAGE", package)
    done = subprocess.run(commands.interpreter_words("train", "it's"), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (7, "localprop train it's\n", "")
