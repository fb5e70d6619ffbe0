"""benchmarks/gpu.py: its stages run on a CPU with tiny sizes, keep their limits, and lose nothing."""

import json
import os
import re
import sys
import time
from dataclasses import dataclass, field

import pytest
import torch

from places import ROOT

sys.path.append(str(ROOT / "benchmarks"))  # as for a script that lies there

import gpu
import publish_gpu
from gpu_stages import correctness, large_images, tables
from gpu_stages.cases import SWIN, TINY, VIT, Case, Way, cases, exact, local
from gpu_stages.results import Results
from gpu_stages.running import NO_TIME, Run, Stage, run_stages
from gpu_stages.steps import build

from localprop import chain

CPU = torch.device("cpu")
GPU_TESTS = """
import pytest
@pytest.mark.gpu
def test_right(): pass
@pytest.mark.gpu
@pytest.mark.parametrize("number", [0])
def test_wrong(number): assert number == 1, "first line"
@pytest.mark.gpu
@pytest.mark.skipif(True, reason="no such thing")
def test_left_out(): pass
def test_of_a_cpu(): raise SystemExit
"""


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, words)])
    return gpu.main()


def rows(content, stage):
    return {row["name"]: row for row in content["stages"][stage]["rows"]}


def test_every_stage_runs_on_a_cpu(monkeypatch, tmp_path, capsys):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_gpu.py").write_text(GPU_TESTS)
    (tmp_path / "tests" / "test_cpu.py").write_text("raise SystemExit\n")
    monkeypatch.setattr(correctness, "TESTS", tmp_path / "tests")
    ways = {
        "end-to-end": Way("ordinary"),
        "K=4": local(["blocks.0"]),
        "K=4, nothing recomputed": local(["blocks.0"], recompute=False),
        "exact K=4": exact(["blocks.0"], "blocks"),
        "checkpointing": Way("checkpointing"),
    }
    case = Case("small", VIT, 2, True, ways, {**TINY[VIT], "depth": 2})
    monkeypatch.setattr(large_images, "cases", lambda dry: [case] if dry else pytest.fail("not dry"))
    out = tmp_path / "dry.json"
    stages = [
        "prediction",
        "correctness",
        "large-swin-bf16-graphs",
        "small-end-to-end",
        "resume",
        "streams",
        "compiled",
    ]
    assert run(monkeypatch, "--dry-run", "--out", out, "--only", *stages) == 1  # since a test fails
    printed, content = capsys.readouterr().out, json.loads(out.read_text())
    assert content["dry_run"] is True
    assert content["device"] == "cpu"
    assert content["versions"].keys() >= {"torch", "timm"}
    assert {stage["error"] for stage in content["stages"].values()} == {None}

    outcomes = {name.partition("::")[2]: row for name, row in rows(content, "correctness").items()}
    assert {name: row["outcome"] for name, row in outcomes.items()} == {
        "test_right": "passed",
        "test_wrong[0]": "failed",
        "test_left_out": "skipped",
    }
    assert "first line" in outcomes["test_wrong[0]"]["why"]
    assert "test_wrong[0]: AssertionError: first line" in printed

    measured = rows(content, "large-swin-bf16-graphs")
    assert list(measured) == [f"small: {way}, graphs" for way in ways]
    measured |= rows(content, "compiled")
    for name in (*measured, *(f"small: {way}, eager" for way in ("end-to-end", "K=4, nothing recomputed"))):
        if measured[name].get("mode") in ("eager", "graphs"):
            assert measured[name]["allocated"] > 0
            assert measured[name]["ms"] > 0
        assert ("note" in measured[name]) == ("eager" not in name)
    assert {row["predicted"] > 0 for row in rows(content, "prediction").values()} == {True}
    small = rows(content, "small-end-to-end")
    assert len(small) == 3
    assert all(row["images_per_second"] > 0 and "CUDA" in row["note"] for row in small.values())
    trained = [row for name, row in small.items() if "localprop train" in name]
    assert all(0.5 < row["peak_memory"] / row["predicted_memory"] < 2 for row in trained)
    assert [row["resumed_equals_uninterrupted"] for row in rows(content, "resume").values()] == [True]
    assert len(rows(content, "streams")) == 2

    assert run(monkeypatch, "--report", out) == 0
    report = capsys.readouterr().out
    assert report.startswith("**A dry run")
    for title in ("Tests marked gpu", "Steps at 224 px", "at 32 px", "Resumed", "Two modules"):
        assert title in report


@pytest.mark.parametrize("model", [SWIN, VIT])
def test_the_cuts_are_units_of_the_models(model):
    of_it = [case for case in cases(dry=True) if case.model == model]
    chains = {}
    for way in (way for case in of_it for way in case.ways.values() if way.cuts):
        split = way.options.get("split_blocks", False)
        if split not in chains:
            chains[split] = [unit.name for unit in chain(of_it[0].backbone(), of_it[0].size, split)]
        assert sorted(way.cuts, key=chains[split].index) == way.cuts
        assert way.cuts[-1] != chains[split][-1]
    assert len(chains) == (2 if model == SWIN else 1)


def test_a_dry_run_differs_in_sizes_only():
    for full, dry in zip(cases(dry=False), cases(dry=True), strict=True):
        assert (full.name, full.model, full.amp, full.ways) == (dry.name, dry.model, dry.amp, dry.ways)
        assert full.size == (3, 224, 224)


def test_exact_training_is_end_to_end_training():
    run, weights = Run(CPU, True, time.monotonic() + 100, lambda *row: None), []
    for way in (Way("ordinary"), exact(["blocks.0"], "blocks")):
        case = Known("small", VIT, 4, False, {}, {**TINY[VIT], "depth": 2})
        step = build(run, case, way, "eager")
        torch.manual_seed(5)
        step()
        weights.append(case.models[0].state_dict())
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@dataclass(frozen=True)
class Known(Case):
    """A case that remembers the models it has built."""

    models: list = field(default_factory=list)

    def backbone(self):
        self.models.append(super().backbone())
        return self.models[-1]


def stages_of(*functions):
    return [Stage(function.__name__, function, 1, "") for function in functions]


def test_a_stage_that_fails_hangs_or_dies_is_one_line_and_the_next_begins(tmp_path):
    def fails(run):
        run.send("first", {"value": 1})
        run.attempt("second", lambda: 1 / 0, known=2)
        run.send("first", {"more": 3})
        raise ValueError("one line\nand another")

    def hangs(run):
        run.send("first", {"value": 1})
        time.sleep(60)

    def dies(run):
        run.send("first", {"value": 1})
        os.kill(os.getpid(), 9)

    def ends(run):
        run.attempt("in time", lambda: {"value": os.getpid()})
        run.deadline = 0
        run.attempt("late", lambda: pytest.fail("begun after its deadline"))

    def beside(run):
        run.send(f"part {run.part[0]}", {"of": run.part[1]})

    results = Results(tmp_path / "out.json", {"dry_run": True})
    stages = [Stage("beside", beside, 0, "", processes=2), *stages_of(fails, hangs, dies, ends)]
    started = time.monotonic()
    run_stages(stages, results, CPU, 6)
    assert time.monotonic() - started < 20
    found = json.loads((tmp_path / "out.json").read_text())
    assert found == results.content
    assert rows(found, "fails") == {
        "first": {"name": "first", "value": 1, "more": 3},
        "second": {"name": "second", "known": 2, "error": "ZeroDivisionError: division by zero"},
    }
    errors = {name: stage["error"] for name, stage in found["stages"].items()}
    assert errors["fails"] == "ValueError: one line"
    assert errors["hangs"].startswith("stopped at its limit of")
    assert errors["dies"] == "it ended with exit code -9"
    assert errors["ends"] is None
    assert errors["beside"] is None
    assert [stage["finished"] for stage in found["stages"].values()] == [True, False, False, False, True]
    assert len(rows(found, "hangs")) == len(rows(found, "dies")) == 1
    assert rows(found, "ends")["in time"]["value"] != os.getpid()
    assert rows(found, "ends")["late"]["error"] == NO_TIME
    assert len(rows(found, "beside")) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dry-run", "--only", "larg3"], "no stage is called larg3; choose from prediction, "),
        (["--dry-run", "--out", gpu.RESULTS / "gpu.json"], "a dry run is no result"),
        (["--dry-run", "--minutes", "nan"], "--minutes is nan; it must be above 0"),
        (["--dry-run", "--out", "/nowhere/gpu.json"], "it must be a file in a folder that exists"),
        (["--dry-run", "--out", ROOT], "it must be a file in a folder that exists"),
        (["--report", "/nowhere/gpu.json"], "is no file of results"),
        (["--report", ROOT / "benchmarks/results/recompute.json"], "is no file of results (it lacks 'dry_run')"),
        ([], "there is no CUDA device"),
    ],
)
def test_a_wrong_command_is_one_line(monkeypatch, capsys, words, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_tables_of_measured_rows():
    def row(way, mode, allocated, ms):
        known = {"case": "Swin", "batch": 128, "way": way, "mode": mode, "decoder": "conv"}
        return {"name": f"Swin: {way}, {mode}", **known, "allocated": allocated, "reserved": allocated, "ms": ms}

    def stage(*own, error=None):
        return {"finished": error is None, "error": error, "rows": list(own)}

    mib = 2**20
    content = {
        "stages": {
            "prediction": stage({"name": "Swin: K=4", "predicted": 294 * mib}),
            "large-eager": stage(row("end-to-end", "eager", 1000 * mib, 60.0), row("K=4", "eager", 300 * mib, 75.0)),
            "large-graphs": stage(row("end-to-end", "graphs", 1000 * mib, 30.0), {"name": "x", "error": "E: no"}),
            "small": stage(
                *(
                    {"name": f"K=4, {kind}", "method": "K=4", "images_per_second": rate}
                    for kind, rate in (("localprop train, graphs", 190.0), ("bare graph", 200.0))
                ),
                error="stopped",
            ),
        }
    }
    first, second = (line.split(" | ") for line in tables.large(content).splitlines()[-2:])
    assert first[1:7] == ["1000", "1.000", "", "1000", "60.0", "1.000"]
    assert second[1:7] == ["300", "0.300", "-2.0%", "300", "75.0", "1.250"]
    assert tables.small(content).splitlines()[-1] == "| K=4 |  | 190 | 200 | 0.950 |  |  |"
    assert tables.problems(content) == "- x: E: no\n- small: stopped"
    assert tables.resume(content) is None


def test_the_page_has_the_tables_of_the_committed_results(monkeypatch, tmp_path, capsys):
    page = tmp_path / "gpu.md"
    page.write_text(publish_gpu.filled(publish_gpu.PAGE.read_text(), "old"))
    monkeypatch.setattr(publish_gpu, "PAGE", page)
    assert publish_gpu.main() == 0
    assert page.read_text() == (ROOT / "docs" / "gpu.md").read_text()

    monkeypatch.setattr(publish_gpu, "RESULTS", tmp_path)
    (tmp_path / "gpu.json").write_text('{"dry_run": true}')
    capsys.readouterr()
    assert publish_gpu.main() == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert page.read_text() == (ROOT / "docs" / "gpu.md").read_text()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_loop_on_the_page_trains_on_a_gpu():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "gpu.md").read_text(), re.DOTALL)
    batch = torch.randn(4, 3, 224, 224), torch.arange(4)
    names = {"loader": [batch] * 6}
    exec(code, names)
    assert names["out"].losses.isfinite().all()
    assert names["out"].prediction.shape == (4, 10)
