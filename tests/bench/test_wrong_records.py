"""Records and suites whose content is wrong but well-formed: each works, or is one line that names the file."""

import json
import math
import shutil

import pytest
import yaml

from bench_records import make_record
from localprop.bench.collect import _finite
from localprop.bench.record import read_record, read_records, write_record
from localprop.bench.reports.groups import comparisons_of
from localprop.bench.reports.measured import how_measured
from localprop.bench.reports.report import comparison_sections, write_report
from localprop.bench.suite import load_suite
from localprop.errors import BenchError, LocalpropError
from places import ROOT
from wrong_values import WRONG, changed, everything_wrong, one_line

RECORDS = ROOT / "benchmarks" / "results" / "cifar10-small"


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
            comparison_sections(comparisons_of(found))
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


def test_the_record_of_a_run_with_any_seed_and_loss_can_be_read(tmp_path):
    record = make_record(seed=-5)
    record.result["loss"] = _finite(math.nan)
    write_record(tmp_path / "a.json", record)
    assert read_record(tmp_path / "a.json").config["seed"] == -5
    assert read_record(tmp_path / "a.json").result["loss"] is None
