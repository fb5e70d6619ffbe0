"""The bench as a user runs it, on digits with a very small Swin; what it starts runs in this process."""

import json
import re
import shutil
import signal
import subprocess
from dataclasses import replace

import pytest

from localprop.bench.collect import collect
from localprop.bench.record import read_record, write_record
from localprop.bench.runner import Runner, alone_in
from localprop.bench.suite import load_suite, shipped_suites
from localprop.cli import main
from localprop.errors import BenchError
from localprop.report.losses import read_losses
from localprop.report.results import read_results
from localprop.settings.config import TrainConfig
from localprop.settings.flags import parse
from localprop.settings.flat import to_flags
from localprop.system.provenance import provenance
from places import ROOT
from started_here import started_here

SUITE = """
description: Two runs.
settings:
  model_kwargs: {patch_size: 4, window_size: 2, embed_dim: 12, depths: [1, 1], num_heads: [1, 2], drop_path_rate: 0.2}
  min_depth: 0
  batch_size: 256
  epochs: 2
  val_interval: 2
  checkpoint_steps: 3
runs:
  - {method: greedy, modules: 3}
  - {method: end-to-end}
"""
STEPS = 2 * 5


@pytest.fixture(scope="module")
def suite_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("suites") / "two.yaml"
    path.write_text(SUITE)
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def runs_here():
    with started_here():
        yield


@pytest.fixture(scope="module")
def finished(suite_file, tmp_path_factory):
    """The results of the suite, run without interruption."""
    folder = tmp_path_factory.mktemp("finished")
    assert main(["bench", suite_file, "--output", str(folder), "--jobs", "2", "--device", "cpu"]) == 0
    return folder


def test_each_run_has_one_result(finished):
    assert sorted(path.name for path in finished.glob("*.json")) == ["end-to-end.json", "greedy-k3.json"]
    record = read_record(finished / "greedy-k3.json")
    row = read_results(finished / "runs" / "greedy-k3" / "results.csv")[-1]
    losses = read_losses(finished / "runs" / "greedy-k3" / "losses.csv")
    assert record.result["accuracy"] == row.headline
    assert record.result["module_accuracies"] == list(row.heads)
    assert record.result["steps"] == STEPS == record.result["curve"]["step"][-1]
    assert [row[3:] for row in losses] == record.result["curve"]["loss"]
    assert record.result["evaluated_on"] == "test"
    assert record.axes == {"method": "greedy", "modules": 3}
    assert record.cost["peak_memory"] == row.peak_memory
    assert 0 < record.cost["seconds_per_step"] < record.cost["seconds"]
    assert len(record.network["modules"]) == 3
    assert (record.data["train_images"], record.data["evaluated_images"]) == (1437, 360)
    assert record.provenance["versions"] == provenance()["versions"]
    assert not list(finished.glob("runs/*/checkpoints"))
    # What is committed and published names no place of the machine that it was made on.
    assert str(finished) not in (finished / "greedy-k3.json").read_text()


def test_a_budget_in_a_suite_chooses_for_the_suites_method_and_a_finished_run_is_not_run_again(tmp_path, capsys):
    path, out = tmp_path / "budget.yaml", tmp_path / "out"
    path.write_text(SUITE.partition("runs:")[0] + "  budget: 1GiB\nruns:\n  - {method: feature-reconstruction}\n")
    command = ["bench", str(path), "--output", str(out), "--device", "cpu", "--set", "epochs=1"]
    assert main(command) == 0
    (record,) = map(read_record, out.glob("*.json"))
    assert record.config["method"] == "feature-reconstruction"
    assert len(record.network["modules"]) > 1
    capsys.readouterr()
    assert main(command) == 0
    assert "1 of 1 runs done" in capsys.readouterr().out


def test_a_run_is_that_of_the_same_train_command(finished, suite_file, tmp_path):
    config = load_suite(suite_file).runs[1].config
    assert main(["train", *to_flags(config), "--output", str(tmp_path), "--experiment", "run", "--device", "cpu"]) == 0
    row = read_results(tmp_path / "run" / "results.csv")[-1]
    record = read_record(finished / "end-to-end.json")
    assert (row.headline, row.score("loss")) == (record.result["accuracy"], record.result["loss"])


def test_what_has_a_result_is_not_run_again(finished, suite_file, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("it started a run"))
    before = {path: path.stat().st_mtime_ns for path in finished.glob("*.json")}
    assert main(["bench", suite_file, "--output", str(finished)]) == 0
    assert {path: path.stat().st_mtime_ns for path in finished.glob("*.json")} == before
    assert "2 of 2 runs done" in capsys.readouterr().out


class Endless:
    """A run that trains until it is asked to stop."""

    returncode = None

    def __init__(self, *_, **__):
        pass

    def poll(self):
        return self.returncode

    def terminate(self):
        self.returncode = 128 + signal.SIGTERM

    def wait(self, timeout):
        assert self.returncode is not None, "it was not asked to stop"
        return self.returncode


def test_a_time_limit_stops_runs_cleanly(suite_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "Popen", Endless)
    flags = ["bench", suite_file, "--output", str(tmp_path), "--device", "cpu", "--jobs", "2"]
    assert main([*flags, "--time-limit", "1s"]) == 75
    assert "2 of 2 runs are not finished; the same command continues with them" in capsys.readouterr().out


def test_a_run_that_fails_is_named(tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text(SUITE.replace("runs:", "runs:\n  - {method: greedy, modules: 3, lr: 1.0e+30}"))
    flags = ["bench", str(path), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*flags, "--only", "*1e+30*"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert re.search(r"1 of 1 runs failed; greedy-k3-lr=1e\+30: the loss of module \d of 3 .* lower --lr", line)


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [
        ("epochs: 2", "epochs: 3", "epochs is 3 in the suite, and 2 there"),
        ("batch_size", "clip_grad: 1.0\n  batch_size", "clip_grad is 1.0 in the suite, and None there"),
        ("min_depth: 0", "min_depth: 1", "min_depth is 1 in the suite, and 0 there"),
    ],
)
def test_results_of_other_settings_are_not_taken_for_this_suites(finished, tmp_path, capsys, old, new, difference):
    path = tmp_path / "two.yaml"
    path.write_text(SUITE.replace(old, new))
    assert main(["bench", str(path), "--output", str(finished)]) == 2
    assert f"is of other settings ({difference}); delete it" in capsys.readouterr().err


def test_a_checkpoint_of_other_settings_is_not_gone_on_with(finished, tmp_path, capsys):
    path = tmp_path / "two.yaml"
    path.write_text(SUITE.replace("epochs: 2", "epochs: 3").replace("val_interval: 2", "val_interval: 3"))
    shutil.copytree(finished / "runs" / "greedy-k3", tmp_path / "out" / "runs" / "greedy-k3")
    (tmp_path / "out" / "runs" / "greedy-k3" / "checkpoints" / "step-00000003").mkdir(parents=True)
    assert main(["bench", str(path), "--output", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err
    assert "runs/greedy-k3 is of other settings (epochs is 3 in the suite, and 2 there)" in line


@pytest.fixture
def in_two_processes(finished, tmp_path):
    """A suite whose runs take two processes each; a run of it with a checkpoint lies in the folder beside it."""
    path, run = tmp_path / "two.yaml", tmp_path / "out" / "runs" / "greedy-k3"
    path.write_text(SUITE.replace("epochs: 2", "epochs: 2\n  parallel: modules\n  nproc: 2\n  trace: true"))
    shutil.copytree(finished / "runs" / "greedy-k3", run)
    return load_suite(str(path)).runs[0], Runner(load_suite(str(path)), tmp_path / "out", places={"download": True})


def test_a_run_of_several_processes_is_resumed_in_as_many(in_two_processes, monkeypatch):
    run, runner = in_two_processes
    (runner.folder / "runs" / "greedy-k3" / "checkpoints" / "step-00000003").mkdir(parents=True)
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda words, **_: started.append(words))
    (runner.folder / "logs").mkdir()
    runner._start(runner._attempt(run), 0, 0)
    (words,) = started
    config = parse(TrainConfig, "train", words[words.index("train") + 1 :])
    assert (config.run.parallel, config.run.nproc, config.run.trace) == ("modules", 2, True)
    assert config.data.download
    assert config.run.resume == str(runner.folder / "runs" / "greedy-k3")


def test_a_result_of_several_processes_is_not_run_again(in_two_processes):
    run, runner = in_two_processes
    record = collect(runner.folder / "runs" / "greedy-k3", "two", run, 1)
    write_record(runner.folder / "greedy-k3.json", record)
    assert runner._attempt(run).state == "done"
    assert (record.config["parallel"], record.config["nproc"]) == ("modules", 2)
    write_record(runner.folder / "greedy-k3.json", replace(record, config=record.config | {"nproc": 4}))
    with pytest.raises(BenchError, match="nproc is 2 in the suite, and 4 there"):
        runner._attempt(run)


def test_what_is_no_checkpoint_is_not_resumed(finished, suite_file, tmp_path):
    run = tmp_path / "runs" / "greedy-k3"
    shutil.copytree(finished / "runs" / "greedy-k3", run)
    (run / "checkpoints" / "step-of-mine").mkdir(parents=True)
    with pytest.raises(BenchError, match="was not made by this bench and has no checkpoint"):
        Runner(load_suite(suite_file), tmp_path)._attempt(load_suite(suite_file).runs[0])


def test_a_run_that_cannot_go_on_says_what_to_delete(finished, suite_file, tmp_path, capsys):
    run = tmp_path / "runs" / "greedy-k3"
    shutil.copytree(finished / "runs" / "greedy-k3", run)
    (run / "checkpoints" / "step-00000003").mkdir(parents=True)  # of which nothing is left
    assert main(["bench", suite_file, "--output", str(tmp_path), "--only", "greedy-k3"]) == 2
    assert f"to begin it anew, delete {run}" in capsys.readouterr().err


def test_two_benches_do_not_share_a_folder(suite_file, tmp_path):
    suite = load_suite(suite_file)
    with alone_in(tmp_path), pytest.raises(BenchError, match="another bench runs in"):
        Runner(suite, tmp_path).run(lambda jobs: None)


def test_a_folder_that_cannot_be_written_to_is_one_line(suite_file, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["bench", suite_file, "--output", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_folders_take_the_place_of_named_data(suite_file, tmp_path, capsys):
    assert main(["bench", suite_file, "--output", str(tmp_path), "--data", "cifar10=x"]) == 2
    assert "--data cifar10=...: two has no such data; it has digits" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1}', '{"format": 1, "suite": "x", "other": 2}'])
def test_a_damaged_result_is_one_line(suite_file, tmp_path, capsys, content):
    (tmp_path / "greedy-k3.json").write_text(content)
    assert main(["bench", suite_file, "--output", str(tmp_path)]) == 2
    assert "damaged; delete it" in capsys.readouterr().err


def test_records_survive_writing(finished, tmp_path):
    record = read_record(finished / "greedy-k3.json")
    curve = {name: values * 100 for name, values in record.result["curve"].items()}
    odd = replace(record, result={**record.result, "loss": 0.1 + 0.2, "top5": None, "curve": curve})
    write_record(tmp_path / "record.json", odd)
    assert read_record(tmp_path / "record.json") == odd
    assert max(map(len, (tmp_path / "record.json").read_text().splitlines())) > 1000, "curves take a line"
    json.loads((tmp_path / "record.json").read_text())


def test_the_index_lists_suites(capsys):
    assert main(["bench"]) == 0
    listed = capsys.readouterr().out
    assert all(suite.name in listed for suite in shipped_suites())
    assert main(["bench", "smoke", "--list"]) == 0
    assert len(capsys.readouterr().out.split()) == 23


@pytest.mark.parametrize(
    ("flags", "line"), [(["--jobs", "0"], "--jobs is 0"), (["--time-limit", "soon"], "is no time")]
)
def test_bad_flags_are_one_line(flags, line, capsys):
    assert main(["bench", "smoke", *flags]) == 2
    assert line in capsys.readouterr().err


def test_provenance_names_the_commit_of_a_checkout():
    found = provenance()
    root = ROOT
    git = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True)
    assert found["commit"] == (git.stdout.strip() if git.returncode == 0 else None)
    assert set(found) == {"commit", "dirty", "date", "versions", "cpu", "cores", "gpu", "threads"}
