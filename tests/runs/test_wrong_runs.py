"""Run folders whose files are wrong but well-formed: each works, or is one line that names the file."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from localprop.bench.collect import collect
from localprop.bench.record import read_record
from localprop.bench.suite import SuiteRun
from localprop.errors import BenchError, CheckpointError, LocalpropError
from localprop.report.losses import read_losses
from localprop.report.results import read_results
from localprop.runs import description
from localprop.runs.description import note_resumption, read_description
from localprop.runs.evaluation import export_run
from localprop.runs.recorded_settings import read_config
from localprop.system.provenance import provenance
from localprop.training.checkpoints.loading import load_checkpoint, newest_checkpoint
from places import FIXTURES
from wrong_values import everything_wrong, one_line


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder as a finished run has it."""
    folder = Path(shutil.copytree(FIXTURES / "run-0.1", tmp_path_factory.mktemp("run") / "run"))
    shutil.copytree(FIXTURES / "run-0.1-finished", folder, dirs_exist_ok=True)
    return folder


def test_run_json(run, monkeypatch):
    now = provenance()
    monkeypatch.setattr(description, "provenance", lambda: now)  # else git is asked each time
    path = run / "run.json"
    original = path.read_text()
    suite_run = SuiteRun("run", {}, replace(read_config(run)))
    accepted = 0
    try:
        for name, wrong in everything_wrong(json.loads(original)):
            path.write_text(json.dumps(wrong))
            try:
                read_description(run)
                collect(run, "suite", suite_run, 1)
                note_resumption(run)
                if name.startswith(("model_kwargs", "input_size", "mean", "std", "crop", "interpolation", "classes")):
                    shutil.rmtree(run / "export", ignore_errors=True)
                    export_run(run, None)
                accepted += 1
            except LocalpropError as error:
                one_line(error, path, run, name)
    finally:
        path.write_text(original)
    assert accepted > 20  # a name may be another


JSONS = {
    "deep": "[" * 100_000,
    "twice": '{"format": 1, "format": 2}',
    "empty": "",
    "digits": "9" * 6000,
    "null": "null",
}


@pytest.mark.parametrize("name", JSONS)
def test_json_that_cannot_be_read(tmp_path, run, name):
    path = tmp_path / "record.json"
    path.write_text(JSONS[name])
    with pytest.raises(BenchError) as caught:
        read_record(path)
    one_line(caught.value, path)
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    (copied / "run.json").write_text(JSONS[name])
    with pytest.raises(CheckpointError) as caught:
        read_description(copied)
    one_line(caught.value, copied / "run.json")


@pytest.mark.parametrize("name", ["results.csv", "losses.csv"])
def test_tables(run, name):
    path = run / name
    read = read_results if name == "results.csv" else read_losses
    original = path.read_text()
    head, *rows = [line.split(",") for line in original.splitlines()]
    cells = ["", "x", "nan", "inf", "-1", "1e999", "9" * 5000, "\0", '"', "1,1", "ü" * 200_000]
    cases = [[head, [*rows[0][:i], cell, *rows[0][i + 1 :]], *rows[1:]] for i in range(len(head)) for cell in cells]
    cases += [[head[:i] + head[i + 1 :], *rows] for i in range(len(head))]
    cases += [
        [[*head, "more"], *rows],
        [head, rows[0][:-1]],
        [head, rows[1], rows[0]],
        [rows[0], *rows],
        [head, rows[0] * 2],
    ]
    refused = 0
    try:
        for case in cases:
            path.write_text("\n".join(map(",".join, case)))
            try:
                read(path)
            except CheckpointError as error:
                refused += 1
                one_line(error, path)
        assert refused > len(cases) * 0.7
        path.write_bytes(original.encode() + b"\xff")
        with pytest.raises(CheckpointError, match=f"{name} is damaged: it is no text in UTF-8"):
            read(path)
    finally:
        path.write_text(original)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_nothing_waits_for_a_pipe_or_reads_a_device(tmp_path, run):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    newest = folder / "checkpoints" / "step-00000030"
    readers = {
        folder / "config.yaml": lambda: read_config(folder),
        folder / "run.json": lambda: read_description(folder),
        folder / "results.csv": lambda: read_results(folder / "results.csv"),
        folder / "losses.csv": lambda: read_losses(folder / "losses.csv"),
        folder / "model.safetensors": lambda: export_run(folder, None),
        newest / "SHA256SUMS": lambda: load_checkpoint(newest),
        newest / "manifest.json": lambda: load_checkpoint(newest),
        newest / "module-0.safetensors": lambda: load_checkpoint(newest),
    }
    for path, read in readers.items():
        aside = path.rename(tmp_path / "aside")
        for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), os.mkdir):
            make(path)
            with pytest.raises(LocalpropError) as caught:
                read()
            one_line(caught.value, path, folder)
            path.rmdir() if path.is_dir() else path.unlink()
        aside.rename(path)
    assert newest_checkpoint(folder / "checkpoints")[0].step == 30
