"""Files whose content is wrong but well-formed: every key that is read, with each of a set of wrong values.

Each either works or gives one line that names the file; a bad newest checkpoint is passed over for the one before it.
"""

import copy
import hashlib
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from bench_records import make_record
from localprop.bench.collect import _finite, collect
from localprop.bench.record import read_record, read_records, write_record
from localprop.bench.reports.groups import tasks_of
from localprop.bench.reports.report import how_measured, task_sections, write_report
from localprop.bench.suite import SuiteRun, load_suite
from localprop.cli import main
from localprop.errors import BenchError, CheckpointError, ConfigError, LocalpropError
from localprop.report.losses import LossCurve, read_losses
from localprop.report.results import read_results, write_results
from localprop.runs import description
from localprop.runs.description import note_resumption, read_config, read_description
from localprop.runs.evaluation import export_run
from localprop.runs.experiment import prepare
from localprop.settings.config import TrainConfig
from localprop.settings.flat import from_flat, to_flags
from localprop.settings.values import read_yaml
from localprop.system.provenance import provenance
from localprop.training.checkpoints.folder import load_checkpoint, newest_checkpoint, save_checkpoint
from localprop.training.state import TrainingState
from localprop.training.trainer import Trainer
from places import FIXTURES, ROOT

RECORDS = ROOT / "benchmarks" / "results" / "cifar10-small"
GONE = object()
WRONG = {
    "gone": GONE,
    "null": None,
    "true": True,
    "negative": -1,
    "huge": 10**30,
    "larger than a float": 10**400,
    "nan": float("nan"),
    "infinite": float("inf"),
    "text": "x",
    "path": "../../../etc/passwd",
    "empty text": "",
    "empty list": [],
    "list": [["x"]],
    "empty mapping": {},
    "mapping": {"x": {"y": 1}},
}
TAGS = {
    "no tensor": {"$tensor": "nothing"},
    "tensor by a list": {"$tensor": []},
    "wrapper": {"$wrapper": ["torch.Tensor", {}, None, [1], [1]]},
    "wrapper of one": {"$wrapper": ["x"]},
    "size": {"$size": ["x"]},
    "dict": {"$dict": [[[], 1]]},
    "tuple": {"$tuple": 3},
    "float": {"$float": "x"},
}


def places(value, place=()):
    """The place of each value in a nested one; of a list only the first element."""
    yield place
    items = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*place, key))


def changed(value, place, wrong):
    """A copy of a nested value with a wrong one in a place."""
    if not place:
        return {} if wrong is GONE else wrong
    result = copy.copy(value)
    if len(place) == 1 and wrong is GONE:
        del result[place[0]]
    else:
        result[place[0]] = changed(value[place[0]], place[1:], wrong)
    return result


def everything_wrong(value, wrongs=WRONG, within=()):
    for place in places(value):
        if place[: len(within)] == within:
            for name, wrong in wrongs.items():
                yield f"{'.'.join(map(str, place))}: {name}", changed(value, place, wrong)


def one_line(error, *names):
    assert "\n" not in str(error)
    assert len(str(error)) < 1000
    assert any(str(name) in str(error) for name in names), error


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """A trainer of the run of version 0.1, and a checkpoint of it before the one that is there.

    That one is as a signal behind the last batch of an epoch leaves it.
    """
    folder = Path(shutil.copytree(FIXTURES / "run-0.1", tmp_path_factory.mktemp("trainer") / "run"))
    experiment = prepare(read_config(folder), weights=False)
    config, data = experiment.config, experiment.data
    state = TrainingState(experiment.localize(), config.optim, data.steps_per_epoch(64), experiment.device)
    made = Trainer(state, data, config, folder, experiment.device, "", 1)
    made.resume()
    meta = load_checkpoint(folder / "checkpoints" / "step-00000030").meta
    meta["position"] |= {"epoch": 0, "batch": 22}
    save_checkpoint(folder / "before", 22, state.parts(), meta, keep=1)
    (folder / "before" / "step-00000022").rename(folder / "checkpoints" / "step-00000022")
    return made


def takes(trainer, newest):
    """Whether the newest checkpoint can be resumed; if so, a step is trained after it."""
    try:
        reason = trainer._accept(load_checkpoint(newest, flaw=trainer.state.flaw))
    except CheckpointError as error:
        one_line(error, newest)
        return False
    return not reason and resumes(trainer)


def resumes(trainer):
    """Resumes, and trains a step if the newest checkpoint was taken; whether it was."""
    notes = trainer.resume()
    taken = trainer.state.step == 30
    assert taken or trainer.state.step == 22
    if taken:
        torch.manual_seed(0)
        try:
            trainer.state.train_step([torch.randn(4, 3, 16, 16), torch.arange(4)], seed=1)
        except LocalpropError as error:
            one_line(error, "module")
    else:
        one_line(notes[0], "step-00000030")
    return taken


def sign(folder):
    """Writes the checksums anew, as a stranger can."""
    files = sorted(path for path in folder.iterdir() if path.name != "SHA256SUMS")
    lines = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)
    (folder / "SHA256SUMS").write_text("".join(lines))


@pytest.fixture
def newest(trainer):
    folder = trainer.folder / "checkpoints" / "step-00000030"
    yield folder
    shutil.rmtree(folder)
    shutil.copytree(FIXTURES / "run-0.1" / "checkpoints" / "step-00000030", folder)


def test_a_manifest(trainer, newest):
    manifest = json.loads((newest / "manifest.json").read_text())
    taken = []
    cases = [*everything_wrong(manifest), *everything_wrong(manifest, TAGS, ("meta", "position"))]
    for i, (name, wrong) in enumerate(cases):
        (newest / "manifest.json").write_text(json.dumps(wrong))
        sign(newest)
        taken += [name] if (takes(trainer, newest) if i % 10 else resumes(trainer)) else []
    # Times and losses may be any, a layout is only a name, and a curve may be shorter.
    free = ("layout", "peak", "seconds", "epoch_seconds", "loss_sums.0")
    assert {name.split(":")[0] for name in taken if not name.startswith("meta.curve")} <= {
        f"meta.position.{name}" for name in free
    }
    assert trainer.resume()[-1].startswith("resumed from")


def test_names_of_parts_stay_in_the_checkpoint(trainer, newest):
    outside = trainer.folder / "outside.safetensors"
    shutil.copy(newest / "module-0.safetensors", outside)
    manifest = json.loads((newest / "manifest.json").read_text())
    for name in ("../../outside.safetensors", str(outside), "..", ".hidden.safetensors", "a\nb.safetensors"):
        (newest / "manifest.json").write_text(json.dumps({**manifest, "parts": [name, *manifest["parts"]]}))
        sign(newest)
        lines = [f"{hashlib.sha256(outside.read_bytes()).hexdigest()}  {name}\n"]
        (newest / "SHA256SUMS").write_text((newest / "SHA256SUMS").read_text() + "".join(lines))
        with pytest.raises(CheckpointError, match="is no file of a checkpoint"):
            load_checkpoint(newest)


def test_parts_of_a_checkpoint(trainer, newest):
    path = newest / "module-0.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        structure = json.loads(file.metadata()["structure"])
    wrongs = {**{name: WRONG[name] for name in ("gone", "null", "negative", "huge", "text", "list", "mapping")}, **TAGS}
    seen = set()
    for name, wrong in everything_wrong(structure, wrongs):
        place = name.split(":")[0]
        # One weight stands for all of a network, and the first parameter for all of an optimizer.
        kind = tuple(word for word in place.split(".") if not word.isdigit())
        key = (kind[:1] if kind[0] in ("backbone", "ema", "auxiliary") else kind, name.split(":")[1])
        if key in seen:
            continue
        seen.add(key)
        save_file(tensors, path, {"structure": json.dumps(wrong)})
        sign(newest)
        takes(trainer, newest)
    assert len(seen) > 100
    wrong_tensors = {name: tensor[:1].clone() if tensor.dim() else torch.zeros(3) for name, tensor in tensors.items()}
    for header in ({"structure": "[" * 100_000}, {"structure": "x"}, {"other": "{}"}, None):
        save_file(tensors, path, header)
        sign(newest)
        assert not resumes(trainer)
    save_file(wrong_tensors, path, {"structure": json.dumps(structure)})
    sign(newest)
    assert not resumes(trainer)


GROUP_OR_STATE = [
    ("param_groups", "amsgrad", True),
    ("param_groups", "maximize", True),
    ("param_groups", "differentiable", True),
    ("param_groups", "eps", -1.0),
    ("param_groups", "lr_scale", "x"),
    ("param_groups", "betas", (math.nan, 0.999)),
    ("state", "step", torch.zeros(3)),
    ("state", "step", torch.tensor(math.nan)),
    ("state", "exp_avg", None),
    ("state", "exp_avg", 5),
    ("state", "exp_avg_sq", "gone"),
]


@pytest.mark.parametrize(("place", "name", "wrong"), GROUP_OR_STATE, ids=lambda value: str(value)[:12])
def test_an_optimizer_that_would_fail_or_train_otherwise_is_passed_over(trainer, newest, place, name, wrong):
    checkpoint = load_checkpoint(newest)
    for part in checkpoint.parts.values():
        entries = part["optimizer"][place]
        for entry in entries if isinstance(entries, list) else entries.values():
            entry[name] = wrong
            if isinstance(wrong, str) and wrong == "gone":
                del entry[name]
    reason = trainer._accept(checkpoint)
    assert "the optimizer" in reason
    assert trainer._accept(load_checkpoint(newest)) is None


def test_a_setting_of_another_version_of_torch_that_is_off_is_no_hindrance(trainer, newest):
    checkpoint = load_checkpoint(newest)
    for part in checkpoint.parts.values():
        for group in part["optimizer"]["param_groups"]:
            group |= {"a_later_one": False, "fused": True}
    assert trainer._accept(checkpoint) is None


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


def test_settings():
    settings = read_yaml(FIXTURES / "run-0.1" / "config.yaml")
    refused = 0
    for _, wrong in everything_wrong(settings):
        if isinstance(wrong, dict):
            try:
                to_flags(from_flat(wrong, "config.yaml"))
            except ConfigError as error:
                refused += 1
                one_line(error, "config.yaml", "--")
    assert refused > 300


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


@pytest.fixture
def records(tmp_path):
    for name in ("end-to-end-s1", "greedy-k2-s1"):
        shutil.copy(RECORDS / f"{name}.json", tmp_path)
    return tmp_path


def test_records(records):
    path = records / "greedy-k2-s1.json"
    record = json.loads(path.read_text())
    cases = [*everything_wrong({key: value for key, value in record.items() if key != "config"})]
    cases = [
        (name, {**wrong, "config": record["config"]} if isinstance(wrong, dict) else wrong) for name, wrong in cases
    ]
    some = {name: WRONG[name] for name in ("null", "negative", "text", "list")}
    cases += [(name, {**record, "config": wrong}) for name, wrong in everything_wrong(record["config"], some)]
    accepted = []
    for name, wrong in cases:
        path.write_text(json.dumps(wrong))
        try:
            found = read_records(records)
            task_sections(tasks_of(found))
            how_measured(found)
            accepted.append(name)
        except BenchError as error:
            one_line(error, path)
    assert accepted
    assert len(accepted) < len(cases) / 2


def test_a_record_whose_losses_are_null_is_reported(records):
    path = records / "greedy-k2-s1.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(changed(record, ("result", "curve"), None)))
    assert records / "report.md" in write_report(records)


SUITE = {
    "description": "x",
    "settings": {"seed": [1, 2], "data": "digits"},
    "runs": [{"method": "greedy", "modules": 2}],
}


def test_suites(tmp_path):
    path = tmp_path / "own.yaml"
    for _, wrong in everything_wrong(SUITE):
        path.write_text(yaml.safe_dump(wrong))
        try:
            load_suite(str(path))
        except LocalpropError as error:
            one_line(error, path, "method", "modules")
    path.write_text(
        yaml.safe_dump({"settings": {name: list(range(99)) for name in ("seed", "epochs", "lr")}, "runs": [{}]})
    )
    with pytest.raises(BenchError, match="comes to more than 10000 runs"):
        load_suite(str(path))


LAUGHS = "a0: &a0 [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30)
)
YAMLS = {
    "laughs": (LAUGHS, "more than 100000 values once its aliases are written out"),
    "deep": ("model_kwargs: " + "[" * 5000, "nested too deep"),
    "rather deep": ("model_kwargs: " + "[" * 60 + "]" * 60, "nested too deep"),
    "itself": ("model_kwargs: &a {x: *a}", "contains itself"),
    "twice": ("lr: 1\nseed: 2\nlr: 3", "line 1: the key 'lr' is there twice"),
    "twice as a flag": ("batch-size: 1\nbatch_size: 2", "the key 'batch_size' is there twice"),
    "twice within": ("model_kwargs: {depth: 1, depth: 2}", "the key 'depth' is there twice"),
    "a class": ("lr: !!python/object/apply:os.system [id]", "line 1 is not valid YAML"),
    "no date": ("lr: 2020-99-99", "not valid YAML"),
    "no time": ("lr: !!timestamp x", "not valid YAML"),
    "no truth": ("lr: !!bool x", "not valid YAML"),
    "digits": ("seed: " + "9" * 6000, "not valid YAML"),
    "a list as a key": ("? [1]\n: 2", "not valid YAML"),
    "numbers as keys": ("1: 2\nx: 3", "unknown setting"),
    "no text": (b"lr: \xff", "it is no text in UTF-8"),
    "long": ("#" * (2**20 + 1), "it is longer than 1 MiB"),
    "two": ("lr: 1\n---\nlr: 2", "line 2 is not valid YAML"),
    "null byte": ('output: "a\\0b"', "output is 'a\\x00b', expected"),
    "infinite": ("lr: " + "9" * 400, "lr is a number of more than 24 digits"),
}


@pytest.mark.parametrize("name", YAMLS)
def test_yaml_that_cannot_be_settings(tmp_path, capsys, name):
    content, line = YAMLS[name]
    path = tmp_path / "theirs.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["train", "-c", str(path)]) == 2
    error = capsys.readouterr().err
    assert line in error
    one_line(error.strip(), path)
    if name not in ("null byte", "deep"):
        with pytest.raises(LocalpropError):
            load_suite(str(path))


def test_aliases_that_do_no_harm_are_read(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model_kwargs: {depths: &two [2, 2], num_heads: *two}\nlr: 1e-3")
    assert read_yaml(path) == {"model_kwargs": {"depths": [2, 2], "num_heads": [2, 2]}, "lr": "1e-3"}


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


def test_a_bad_newest_checkpoint_is_passed_over_by_eval_too(trainer, newest, capsys):
    save_file({"x": torch.ones(1)}, newest / "module-0.safetensors", {"structure": '{"backbone": [], "auxiliary": {}}'})
    sign(newest)
    assert main(["eval", str(trainer.folder), "--device", "cpu"]) == 0
    assert "step-00000022" in capsys.readouterr().out


def test_defaults_are_settings_that_can_be_read():
    assert from_flat({}, "nothing") == TrainConfig()


def test_what_a_run_with_a_skipped_step_writes_can_be_read_again(tmp_path, trainer, newest):
    """With a loss scale, a step whose loss overflows is skipped: its loss is recorded as it is."""
    curve = LossCurve(steps=2, modules=2)
    for step, losses in ((1, [math.nan, math.inf]), (2, [1.0, 2.0])):
        curve.add(step, losses, 0.1, 0.1)
    curve.write(tmp_path / "losses.csv", 2)
    assert math.isnan(read_losses(tmp_path / "losses.csv")[0][3])
    again = LossCurve(steps=2, modules=2)
    again.load(curve.state())
    assert str(again.rows) == str(curve.rows)
    rows = read_results(FIXTURES / "run-0.1-finished" / "results.csv")
    rows[-1] = replace(rows[-1], train_losses=(math.inf, 1.0), test_loss=math.nan)
    write_results(tmp_path / "results.csv", rows)
    assert str(read_results(tmp_path / "results.csv")) == str(rows)
    checkpoint = load_checkpoint(newest)
    checkpoint.meta["position"]["loss_sums"][0] = math.nan
    assert trainer._accept(checkpoint) is None


def test_the_record_of_a_run_with_any_seed_and_loss_can_be_read(tmp_path):
    record = make_record(seed=-5)
    record.result["loss"] = _finite(math.nan)
    write_record(tmp_path / "a.json", record)
    assert read_record(tmp_path / "a.json").config["seed"] == -5
    assert read_record(tmp_path / "a.json").result["loss"] is None
