"""Suites: what a YAML file of a grid of runs comes to."""

import itertools
from dataclasses import replace

import pytest

from bench_records import make_record
from localprop.bench.collect import differing, settings_in
from localprop.bench.record import read_record, settings_of, write_record
from localprop.bench.suite import SuiteRun, load_suite, shipped_suites
from localprop.decoders import DECODERS
from localprop.errors import BenchError, ConfigError
from localprop.heads import HEADS
from localprop.methods import check_method
from localprop.registry import DATASETS
from localprop.settings.config import LocalConfig, TrainConfig
from localprop.settings.flat import from_flat, to_flat
from places import ROOT


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "own.yaml"
        path.write_text(text)
        return str(path)

    return write


GRID = """
description: A grid.
settings: {epochs: 3, seed: [1, 2], val-interval: 3}
runs:
  - method: end-to-end
  - {method: [greedy, infopro], modules: [2, 4], head: linear}
"""


def test_a_suite_is_the_grid_of_its_settings_and_runs(write):
    suite = load_suite(write(GRID))
    found = [(r.config.run.seed, r.config.local.method, r.config.local.modules) for r in suite.runs]
    wanted = []
    for seed in (1, 2):  # the first seed of everything before the second of anything
        wanted += [(seed, "end-to-end", None)]
        wanted += [(seed, *pair) for pair in itertools.product(["greedy", "infopro"], [2, 4])]
    assert found == wanted
    assert all(r.config.optim.epochs == r.config.run.val_interval == 3 for r in suite.runs)
    assert [r.config.local.head for r in suite.runs[:2]] == [TrainConfig().local.head, "linear"]


def test_runs_are_named_after_what_differs(write):
    suite = load_suite(write(GRID))
    assert [run.name for run in suite.runs[:3]] == ["end-to-end-s1", "greedy-k2-linear-s1", "greedy-k4-linear-s1"]
    assert suite.runs[-1].axes == {"method": "infopro", "modules": 4, "head": "linear", "seed": 2}


def test_a_setting_that_follows_from_others_is_not_in_the_name(write):
    runs = "[{data: digits, epochs: 1}, {data: svhn, epochs: 2}, {data: svhn, epochs: 2, amp: true}]"
    suite = load_suite(write(f"settings: {{method: greedy}}\nruns: {runs}"))
    assert [run.name for run in suite.runs] == ["digits", "svhn", "svhn-amp"]
    assert suite.runs[2].axes == {"data": "svhn", "epochs": 2, "amp": True}


def test_more_seeds_leave_the_names_of_runs_alone(write):
    names = [{run.name for run in load_suite(write(GRID.replace("[1, 2]", seeds))).runs} for seeds in ("1", "[1, 2]")]
    assert names[0] < names[1]


def test_a_misspelt_method_is_found_before_anything_runs(write):
    with pytest.raises(ConfigError, match="did you mean 'greedy'"):
        load_suite(write("settings: {}\nruns: [{method: greddy}]"))


def test_values_that_are_lists_or_mappings_lie_in_another_list(write):
    runs = "[{cuts: [[a, b], [c]]}, {method_kwargs: [{weight: 0.5}, {weight: 2}]}]"
    suite = load_suite(write(f"settings: {{}}\nruns: {runs}"))
    assert [run.config.local.cuts for run in suite.runs] == [("a", "b"), ("c",), None, None]
    assert [run.name for run in suite.runs] == ["cuts=a,b", "cuts=c", "weight=0.5", "weight=2"]


def test_changes_take_the_place_of_the_suites_settings(write):
    suite = load_suite(write(GRID), {"epochs": 7, "head": "conv"})
    assert {(run.config.optim.epochs, run.config.local.head) for run in suite.runs} == {(7, "conv")}


def test_only_some_runs(write):
    suite = load_suite(write(GRID))
    assert [run.name for run in suite.only(["*-k4-*-s2", "end-*"]).runs] == [
        "end-to-end-s1", "end-to-end-s2", "greedy-k4-linear-s2", "infopro-k4-linear-s2"
    ]  # fmt: skip
    with pytest.raises(BenchError, match="no run of own matches 'greddy'"):
        suite.only(["end-*", "greddy"])


def test_a_base_comes_before_a_suites_own_runs(write):
    own = load_suite(write("base: smoke\nruns: [{method: mine, plugin: mine.py, modules: 2}]"))
    base = load_suite("smoke")
    assert [run.name for run in own.runs] == [*(run.name for run in base.runs), "mine-k2-s1"]
    assert [run.config for run in own.runs[:-1]] == [run.config for run in base.runs]
    assert own.runs[-1].config.optim == base.runs[0].config.optim
    with pytest.raises(BenchError, match="no suite is called 'smok'; did you mean 'smoke'"):
        load_suite(write("base: smok\nruns: []"))


@pytest.mark.parametrize(
    ("text", "error", "line"),
    [
        ("settings: {lr: 1}\nruns: [{epohcs: 2}]", ConfigError, "unknown setting 'epohcs'; did you mean 'epochs'"),
        ("settings: {lr: high}\nruns: [{}]", ConfigError, "lr is 'high', expected float"),
        ("settings: {}\nruns: {method: greedy}", BenchError, "is no suite"),
        ("runs: [{method: greedy}]", BenchError, "is no suite"),
        ("setings: {}\nruns: [{}]", BenchError, "unknown key 'setings'"),
        ("settings: {output: here}\nruns: [{}]", BenchError, "output is not for a suite to set"),
        ("settings: {}\nruns: [{epochs: 2}, {epochs: 2}]", BenchError, "2 runs are called run"),
        ("settings: {}\nruns: []", BenchError, "has no runs"),
        ("settings: {seed: []}\nruns: [{}]", BenchError, "has no runs: a setting has an empty list"),
        (f"settings: {{seed: 0x{'f' * 400}}}\nruns: [{{}}]", ConfigError, "--seed is a number of more than 24 digits"),
        ("settings: {decoder: conf}\nruns: [{}]", BenchError, "no decoder is called 'conf'; did you mean 'conv'"),
        ("base: own.yaml\nruns: [{}]", BenchError, "is its own base"),
    ],
)
def test_a_mistake_is_one_line(write, text, error, line):
    with pytest.raises(error, match=line) as caught:
        load_suite(write(text))
    assert "own.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_suites_get_a_suggestion(tmp_path):
    with pytest.raises(BenchError, match="did you mean 'smoke'"):
        load_suite("smokey")
    with pytest.raises(ConfigError, match=r"cannot read settings from .*none.yaml"):
        load_suite(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize("name", [suite.name for suite in shipped_suites()])
def test_shipped_suites_name_only_what_there_is(name):
    suite = load_suite(name)
    assert suite.description
    assert len({run.name for run in suite.runs}) == len(suite.runs)
    for run in suite.runs:
        local = run.config.local
        assert run.config.data.data.removeprefix("folder:") in (*DATASETS, "flowers17", "svhn10k")
        assert local.decoder in DECODERS
        assert local.head in (None, *HEADS)
        check_method(local.method, local.modules, dict(local.method_kwargs or {}))
        assert from_flat(to_flat(run.config), "again") == run.config
        # The protocol: test images are looked at once.
        assert run.config.run.val_interval == run.config.optim.epochs or run.config.data.val_split > 0


def test_compared_runs_share_one_protocol():
    suite = load_suite("cifar10-small")
    free = {"method", "modules", "decoder", "seed", "lr", "method_kwargs"}
    flats = [{k: v for k, v in to_flat(run.config).items() if k not in free} for run in suite.runs]
    assert all(flat == flats[0] for flat in flats)
    found = {(r.config.local.method, r.config.local.modules, r.config.local.decoder) for r in suite.runs}
    decoders = ("conv", "deconv", "pixel-shuffle", "transformer")
    assert {("feature-reconstruction", 4, decoder) for decoder in decoders} <= found
    assert all((m, k, "conv") in found for m in ("greedy", "infopro", "feature-reconstruction") for k in (2, 4))
    assert {run.config.run.seed for run in suite.runs} == {1, 2}


@pytest.mark.parametrize(("name", "count"), [("cifar10-small", 20), ("gap", 3)])
def test_results_of_a_version_with_fewer_settings_are_still_of_their_suite(name, count):
    """The committed results: what came later has defaults with which everything is as before."""
    records = {path.stem: read_record(path) for path in (ROOT / "benchmarks" / "results" / name).glob("*.json")}
    runs = {run.name: run for run in load_suite(name).runs}
    assert len(records) >= count
    assert {run: differing(record.config, runs[run]) for run, record in records.items()} == dict.fromkeys(records)


def test_defaults_fill_in_what_runs_leave_open_and_name_none(tmp_path, write):
    runs, without = (
        load_suite(write("defaults: {decoder: deconv, epochs: 9}\n" + GRID)).runs,
        load_suite(write(GRID)).runs,
    )
    assert [run.name for run in runs] == [run.name for run in without]
    assert {run.config.local.decoder for run in without} == {"pixel-shuffle"}
    assert {(run.config.local.decoder, run.config.optim.epochs) for run in runs} == {("deconv", 3)}
    (tmp_path / "below.yaml").write_text("defaults: {decoder: deconv, head: conv}\n" + GRID)
    above = load_suite(write("base: below.yaml\ndefaults: {decoder: conv}")).runs
    assert {(run.config.local.decoder, run.config.local.head) for run in above} == {
        ("conv", "conv"),
        ("conv", "linear"),
    }


@pytest.mark.parametrize(
    "defaults", ["3", "[decoder]", "{decoder: [conv, deconv]}", "{output: here}", "{decoder: conf}"]
)
def test_wrong_defaults_are_one_line(write, defaults):
    with pytest.raises((BenchError, ConfigError)) as error:
        load_suite(write(f"defaults: {defaults}\n{GRID}"))
    assert "\n" not in str(error.value)


def test_a_result_from_before_a_setting_existed_equals_one_with_the_default_of_then(tmp_path):
    run = SuiteRun("run", {}, TrainConfig(local=LocalConfig(decoder="conv")))
    whole = settings_of(run.config)
    for name in sorted(whole.keys() - {"method", "seed"}):  # which every record has
        record = make_record()
        write_record(tmp_path / "run.json", replace(record, config={k: v for k, v in whole.items() if k != name}))
        assert differing(read_record(tmp_path / "run.json").config, run) is None, name
    # So does the folder of a run that was cut off, which the suite resumes.
    (tmp_path / "config.yaml").write_text(f"method: {whole['method']}\nseed: {whole['seed']}\n")
    assert differing(settings_in(tmp_path, run), run) is None
    stopped = replace(run, config=replace(run.config, run=replace(run.config.run, steps=3)))
    assert differing(read_record(tmp_path / "run.json").config, stopped) == "steps is 3 in the suite, and None there"
