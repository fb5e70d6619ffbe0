"""A run folder or a folder of results from a stranger: nothing outside of it is written or deleted, whatever links."""

import os
import shutil
from pathlib import Path

import pytest

from checkpoint_states import names, save, state_at
from localprop.bench.runner import Runner
from localprop.bench.suite import SuiteRun, load_suite
from localprop.cli import main
from localprop.errors import BenchError, CheckpointError
from localprop.settings.config import TrainConfig
from localprop.system.files import remove_leftovers, remove_tree, write_text
from localprop.training import outputs
from localprop.training.checkpoints.loading import newest_checkpoint
from localprop.training.checkpoints.saving import save_checkpoint
from places import FIXTURES

FIXTURE = FIXTURES / "run-0.1"
SUITE = "settings: {epochs: 1}\nruns: [{method: end-to-end}]"


@pytest.fixture
def home(tmp_path):
    """A folder of the user's own, to which links lead."""
    home = tmp_path / "home"
    (home / "step-00000001").mkdir(parents=True)
    for name in ("thesis.txt", "manifest.json", "results.csv", "step-00000001/data"):
        (home / name).write_text("mine")
    return home


@pytest.fixture(autouse=True)
def untouched(home):
    yield
    assert names(home) == ["manifest.json", "results.csv", "step-00000001", "thesis.txt"]
    assert {file.read_text() for file in home.rglob("*") if file.is_file()} == {"mine"}
    assert home.is_dir()


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def test_a_run_folder_full_of_links_is_resumed_without_following_one(tmp_path, home, monkeypatch):
    """And a kill while the curves are drawn loses nothing."""
    run = Path(shutil.copytree(FIXTURE, tmp_path / "run"))
    for step in (35, 42, 44, 66):
        link(run / "checkpoints" / f".step-{step:08d}.tmp", home)
        link(run / "checkpoints" / f"step-{step:08d}.old", home)
    for name in ("results.csv", "losses.csv", "curves.png", "model.safetensors", "run.json"):
        link(run / f".{name}.tmp", home)
    for name in ("curves.png", "model.safetensors"):
        link(run / name, home / "thesis.txt")
    link(run / ".losses.csv.0123456789abcdef.tmp", home)
    draw = outputs.draw_curves

    def killed(path, rows, *words):
        if rows[-1].epoch == 3:
            raise SystemExit(9)
        draw(path, rows, *words)

    monkeypatch.setattr(outputs, "draw_curves", killed)
    with pytest.raises(SystemExit):
        main(["train", "--resume", str(run)])
    monkeypatch.undo()
    assert main(["train", "--resume", str(run)]) == 0
    assert not [path for path in run.rglob("*") if path.is_symlink()]
    assert names(run / "checkpoints") == ["step-00000066"]
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_written_aside_meets_nothing_that_was_there(tmp_path, home):
    (tmp_path / ".results.csv.tmp").mkdir()
    link(tmp_path / ".results.csv.tmp" / "results.csv", home / "results.csv")
    write_text(tmp_path / "results.csv", "new")
    assert (tmp_path / "results.csv").read_text() == "new"
    assert names(tmp_path) == ["home", "results.csv"]


def test_checkpoints_are_not_saved_through_a_link(tmp_path, home, capsys):
    link(tmp_path / "checkpoints", home)
    with pytest.raises(CheckpointError, match=r"checkpoints is a link, and nothing is written through it"):
        save(tmp_path / "checkpoints", 5, keep=1)
    run = Path(shutil.copytree(FIXTURE, tmp_path / "run"))
    (run / "checkpoints").rename(tmp_path / "moved")
    link(run / "checkpoints", tmp_path / "moved")
    assert main(["train", "--resume", str(run)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert names(tmp_path / "moved") == ["step-00000030"]


def test_the_run_folder_itself_may_be_reached_through_a_link(tmp_path):
    (tmp_path / "disk" / "run").mkdir(parents=True)
    link(tmp_path / "runs", tmp_path / "disk")
    save_checkpoint(tmp_path / "runs" / "run" / "checkpoints", 3, state_at(3), {}, keep=1)
    save_checkpoint(tmp_path / "runs" / "run" / "checkpoints", 4, state_at(4), {}, keep=1)
    assert names(tmp_path / "disk" / "run" / "checkpoints") == ["step-00000004"]


def test_links_called_like_old_checkpoints_are_removed_and_not_followed(tmp_path, home):
    folder = tmp_path / "checkpoints"
    for name in ("step-00000002", "step-00000003.old", "step-00000009", ".step-00000001.tmp"):
        link(folder / name, home)
    (folder / ".step-00000001.0123456789abcdef.tmp").mkdir()
    link(folder / ".step-00000001.0123456789abcdef.tmp" / "deeper", home)
    save(folder, 3, keep=1)
    assert names(folder) == ["step-00000003"]
    (folder / "step-00000005").symlink_to(home)
    save(folder, 5, keep=1)  # in the place of the link
    assert names(folder) == ["step-00000005"]
    assert newest_checkpoint(folder)[0].step == 5


def test_only_what_lies_inside_is_removed(tmp_path, home):
    root = tmp_path / "root"
    (root / "inner").mkdir(parents=True)
    link(root / "inner" / "way", home)
    for path in (root / "..", root / "inner" / "..", root / ".." / "home", root, root / "inner" / "way" / "thesis.txt"):
        with pytest.raises(CheckpointError, match="is not removed, because it is not inside"):
            remove_tree(path, root)
    remove_tree(root / "inner", root)
    assert names(root) == []


def test_leftovers_are_removed_by_their_own_pattern_alone(tmp_path):
    kept = [".results.csv.0123456789abcde.tmp", "results.csv.0123456789abcdef.tmp", ".notes", ".cache.tmp"]
    for name in [*kept, ".results.csv.0123456789abcdef.tmp"]:
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted([*kept, "home"])
    old = tmp_path / ".results.csv.fedcba9876543210.tmp"
    old.mkdir()
    os.utime(old, (0, 0))
    (tmp_path / ".results.csv.0000000000000000.tmp").mkdir()  # perhaps another process is writing it
    write_text(tmp_path / "results.csv", "")
    assert set(names(tmp_path)) - set(kept) == {"home", "results.csv", ".results.csv.0000000000000000.tmp"}


def test_a_folder_that_is_gone_is_not_made_again(tmp_path):
    with pytest.raises(CheckpointError, match="No such file or directory; its folder is not there"):
        write_text(tmp_path / "run" / "results.csv", "")
    with pytest.raises(CheckpointError, match="its folder is not there"):
        save(tmp_path / "run" / "checkpoints", 1)
    assert names(tmp_path) == ["home"]


def test_an_export_does_not_follow_a_link_in_the_run_folder(tmp_path, capsys):
    run = Path(shutil.copytree(FIXTURE, tmp_path / "run"))
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "nothing"):
        link(run / "export", target)
        assert main(["export", str(run)]) == 2
        assert "export exists already; choose another --output" in capsys.readouterr().err
        (run / "export").unlink()
    assert names(tmp_path) == ["empty", "home", "run"]
    assert names(tmp_path / "empty") == []
    link(tmp_path / "mine", tmp_path / "empty")
    assert main(["export", str(run), "--output", str(tmp_path / "mine")]) == 0  # which the user has named
    assert names(tmp_path / "empty") == ["config.json", "model.safetensors"]


@pytest.fixture
def started(monkeypatch):
    """The commands that a bench starts; none of them really runs."""

    class Ended:
        returncode = 7

        def poll(self):
            return self.returncode

    commands = []
    monkeypatch.setattr("subprocess.Popen", lambda words, **_: commands.append(words) or Ended())
    return commands


@pytest.fixture
def suite(tmp_path, started):
    (tmp_path / "own.yaml").write_text(SUITE)
    return load_suite(str(tmp_path / "own.yaml"))


@pytest.mark.parametrize("name", [".lock", "logs", "runs", "runs/run"])
def test_a_bench_writes_through_no_link(tmp_path, home, suite, name):
    link(tmp_path / "out" / name, home / "thesis.txt" if name == ".lock" else home)
    with pytest.raises((BenchError, CheckpointError), match="is a link, and nothing is written through it") as caught:
        Runner(suite, tmp_path / "out").run(lambda jobs: None)
    assert f"out/{name}" in str(caught.value)


def test_a_log_is_not_written_through_a_link(tmp_path, home, suite):
    link(tmp_path / "out" / "logs" / "run.log", home / "thesis.txt")
    with pytest.raises(CheckpointError, match=r"run\.log is a link"):
        Runner(suite, tmp_path / "out").run(lambda jobs: None)


def test_a_folder_that_the_bench_did_not_make_is_refused_and_kept(tmp_path, suite):
    own = tmp_path / "out" / "runs" / "run"
    own.mkdir(parents=True)
    (own / "thesis.txt").write_text("mine")
    for _ in range(2):
        with pytest.raises(BenchError, match="run was not made by this bench and has no checkpoint"):
            Runner(suite, tmp_path / "out").run(lambda jobs: None)
    assert (own / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["..", ".", ".hidden", "a" * 300])
def test_names_of_runs_stay_in_their_folder(tmp_path, capsys, suite, name):
    """A setting that names a run makes its folder's name too."""
    own, out = tmp_path / "own.yaml", tmp_path / "out"
    own.write_text(f"settings: {{}}\nruns: [{{model: '{name}'}}, {{model: resnet18}}]")
    for folder in ("runs", "logs"):
        (out / folder).mkdir(parents=True)
        (out / folder / "mine.txt").write_text("mine")
    assert main(["bench", str(own), "--output", str(out)]) == 2
    error = capsys.readouterr().err
    assert "own.yaml: a run would be called" in error
    assert error.count("\n") == 1
    made_up = Runner(suite, out)
    made_up.suite.__dict__["runs"] = (SuiteRun(name, {}, TrainConfig()),)
    with pytest.raises(BenchError, match="a run would be called"):
        made_up.run(lambda jobs: None)
    assert (out / "runs" / "mine.txt").read_text() == (out / "logs" / "mine.txt").read_text() == "mine"


def test_what_a_bench_began_is_started_anew(tmp_path, suite, started):
    """A run that was cut off before its first checkpoint has a log, and nothing in its folder is worth keeping."""
    out = tmp_path / "out"
    for path in (out / "runs" / "run" / "config.yaml", out / "logs" / "run.log"):
        path.parent.mkdir(parents=True)
        path.write_text("")
    jobs = Runner(suite, out).run(lambda jobs: None)
    assert not (out / "runs" / "run").exists()
    assert len(started) == 1
    assert jobs[0].state == "failed"
