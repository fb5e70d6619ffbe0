"""Run folders: found again, resumed or started anew, used by one process at a time, and never written to when gone."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from localprop.cli import main
from localprop.errors import CheckpointError, ConfigError
from localprop.runs.folder import create_run_folder, newest_run
from localprop.settings.flat import from_flat
from localprop.system.commands import interpreter_words, resume_command
from localprop.system.lock import LOCK, FolderLock
from localprop.training.trainer import Trainer
from places import FIXTURES
from ranks import SMALL

RUN_OF_0_1 = FIXTURES / "run-0.1"
FLAGS = [*SMALL, "--epochs", "1", "--cuts", "layers.0"]
HOLD = "import sys; from pathlib import Path; from localprop.system.lock import FolderLock\n"
HOLD += "lock = FolderLock(Path(sys.argv[1])); print('locked', flush=True); sys.stdin.read()"


def train(output, *more):
    return main(["train", *FLAGS, "--output", str(output), *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("finished")
    assert train(output, "--experiment", "run") == 0
    return output / "run"


def without_checkpoint(run, target):
    """What a run leaves that died before its first checkpoint."""
    target.mkdir(parents=True)
    for name in ("config.yaml", "run.json"):
        shutil.copy(run / name, target)
    return target


def test_a_run_that_died_before_its_first_checkpoint_starts_anew_when_resumed(finished, tmp_path, capsys):
    dead = without_checkpoint(finished, tmp_path / "dead")
    assert main(["train", "--resume", str(dead)]) == 0
    assert "the run starts anew" in capsys.readouterr().out.replace("\n", " ")
    weights, expected = (load_file(run / "model.safetensors") for run in (dead, finished))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_it_does_not_stand_in_the_way_of_an_older_run_that_has_one(tmp_path):
    older = Path(shutil.copytree(RUN_OF_0_1, tmp_path / "older"))
    for path in (older, older / "config.yaml", older / "checkpoints"):
        os.utime(path, (1, 1))
    dead = without_checkpoint(older, tmp_path / "dead")
    assert newest_run(tmp_path) == older
    shutil.rmtree(older)
    assert newest_run(tmp_path) == dead


def test_a_finished_run_without_checkpoints_is_never_started_anew(finished, tmp_path, capsys):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(CheckpointError, match="no run to resume"):
        newest_run(tmp_path)
    assert main(["train", "--resume", str(run)]) == 2
    assert "no valid checkpoint" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_run_inside_another_folder_is_found(tmp_path, capsys):
    assert train(tmp_path, "--experiment", "group/one") == 0
    assert newest_run(tmp_path) == tmp_path / "group" / "one"
    assert main(["train", "--resume", "--output", str(tmp_path)]) == 0
    assert "resumed from" in capsys.readouterr().out


def test_links_lead_to_runs_and_one_to_nowhere_is_no_hindrance(tmp_path):
    run = Path(shutil.copytree(RUN_OF_0_1, tmp_path / "scratch" / "run"))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "linked").symlink_to(run)
    (tmp_path / "runs" / "back").symlink_to(tmp_path / "runs")
    (run / "check").symlink_to("nowhere")
    assert newest_run(tmp_path / "runs") == tmp_path / "runs" / "linked"


@pytest.mark.parametrize("words", [["eval"], ["export"], ["train", "--resume"], ["train", "--experiment"]])
def test_a_name_too_long_for_a_disk_is_one_line(tmp_path, capsys, words):
    assert main([*words, "x" * 300, *(["--output", str(tmp_path)] if words[0] == "train" else [])]) == 2
    error = capsys.readouterr().err
    assert "xxx" in error
    assert error.count("\n") == 1


def test_a_name_is_free_again_where_a_run_died_at_once(tmp_path):
    config = from_flat({"output": str(tmp_path), "experiment": "a"}, "test")
    folder = create_run_folder(config)
    with FolderLock(folder):
        pass
    assert create_run_folder(config) == folder
    (folder / "config.yaml").touch()
    with pytest.raises(ConfigError, match="exists already"):
        create_run_folder(config)


def test_a_second_process_on_a_run_folder_is_refused_before_anything_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("localprop.runs.common.prepare", lambda *_, **__: pytest.fail("it loads data"))
    run = Path(shutil.copytree(RUN_OF_0_1, tmp_path / "run"))
    files = sorted(run.rglob("*"))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run)], **pipes) as other:
        assert other.stdout.readline() == "locked\n"
        assert main(["train", "--resume", str(run)]) == 2
        error = capsys.readouterr().err
        assert f"another process is writing into {run}" in error
        assert error.count("\n") == 1
        other.kill()
    assert sorted(run.rglob("*")) == sorted([*files, run / LOCK])
    with FolderLock(run):  # a killed process holds nothing
        pass


def test_a_lock_is_never_opened_through_a_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(victim)
    with pytest.raises(CheckpointError, match="is a link"):
        FolderLock(tmp_path / "run")
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_removed_while_training_ends_the_run_with_one_line(tmp_path, capsys, monkeypatch, replaced):
    run, save = tmp_path / "run", Trainer._save

    def remove_then_save(trainer):
        shutil.rmtree(run)
        if replaced:
            shutil.copytree(RUN_OF_0_1, run)
        return save(trainer)

    monkeypatch.setattr(Trainer, "_save", remove_then_save)
    assert train(tmp_path, "--experiment", "run") == 2
    error = capsys.readouterr().err
    assert "was removed or replaced" in error
    assert error.count("\n") == 1
    if replaced:
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000030"]
    else:
        assert not run.exists()


def test_printed_commands_can_be_pasted(tmp_path, monkeypatch, capsys):
    output = tmp_path / "my runs; rm -rf $HOME"
    monkeypatch.setattr(Trainer, "_train_epoch", lambda trainer, progress: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(Trainer, "_finish_epoch", lambda trainer, progress: trainer._stop_if_asked(0))
    assert train(output, "--experiment", "it's one") == 128 + signal.SIGTERM
    (line,) = re.findall("resume with: (.*)\n", capsys.readouterr().err)
    assert shlex.split(line) == ["localprop", "train", "--resume", str(output / "it's one")]
    words = shlex.split(resume_command(Path("a b"), Path("it's mine.py")))
    assert words == ["localprop", "train", "--resume", "a b", "--plugin", "it's mine.py"]


@pytest.mark.parametrize("words", [[sys.executable, "-m", "localprop"], interpreter_words()], ids=["typed", "started"])
def test_ctrl_c_while_modules_are_imported_is_one_line(words):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen([*words, "chain", "resnet18"], **pipes) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        while process.poll() is None and "torch" not in maps.read_text():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
    assert error == "localprop: stopped\n"
    assert process.returncode == 130
