"""The planner: what it predicts, what it recommends, and what its command says."""

import csv
import json
import shlex

import pytest

import localprop
from localprop.cli import main
from localprop.config import LocalConfig, TrainConfig, parse_bytes, to_flags
from localprop.errors import ConfigError, PlanError
from tiny import SIZE, build

TINY = ["--model", "vit_tiny_patch16_224", "--img-size", "32", "--num-classes", "5", "--batch-size", "8"]
TINY += ["--model-kwargs", "patch_size=8", "depth=3", "embed_dim=48", "num_heads=3"]


@pytest.fixture(scope="module")
def rows():
    return localprop.plan(build("vit"), 8, modules=(2, "max"), input_size=SIZE).rows


def test_end_to_end_comes_first_and_more_modules_take_less(rows):
    result = localprop.Plan(rows)
    assert [row.setting.modules for row in rows][:3] == [1, 1, 2]
    assert result.memory_ratio(rows[0]) == result.time_ratio(rows[0]) == 1
    assert rows[2].trace.peak < rows[0].trace.peak
    assert all(sum(row.trace.parts.values()) == row.trace.peak for row in rows)


def test_the_cheapest_setting_that_fits_is_chosen(rows):
    def choice(budget):
        return localprop.plan(build("vit"), 8, modules=(2, 3), input_size=SIZE, budget=budget).choice

    whole, two = rows[0].trace.peak, rows[2].trace.peak
    assert choice(whole).setting.modules == 1
    assert choice(whole - 1).setting.modules == 2
    assert choice(two).trace.peak <= two


def test_where_nothing_fits_the_largest_batch_that_does_is_chosen(rows):
    budget = min(row.trace.peak for row in rows) * 3 // 4
    choice = localprop.plan(build("vit"), 8, modules=(2, "max"), input_size=SIZE, budget=budget).choice
    assert choice.batch_size < 8
    assert choice.trace.peak <= budget
    with pytest.raises(PlanError, match="with 1 image per step takes"):
        localprop.plan(build("vit"), 8, modules=(2,), input_size=SIZE, budget=1000)


def test_the_command_writes_json_and_picture_and_names_what_trains(tmp_path, capsys):
    report, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    assert (
        main(["plan", *TINY, "--modules", "3", "--budget", "1GiB", "--json", str(report), "--picture", str(picture)])
        == 0
    )
    text = capsys.readouterr().out
    result = json.loads(report.read_text())
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [row["modules"] for row in result["rows"]] == [1, 1, 3]
    assert result["choice"]["modules"] == 3  # asked for, though end-to-end fits
    assert result["command"] in text.replace("\n", "")
    assert shlex.split(result["command"])[:2] == ["localprop", "train"]
    assert "--modules 3" in result["command"]


@pytest.mark.parametrize(
    "flags",
    [["--budget", "much"], ["--json", "/no/such/folder/x.json"], ["--modules", "99"], ["--batch-size", "0"]],
)
def test_a_mistake_is_one_line(flags, capsys):
    assert main(["plan", *TINY, *flags]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_training_within_a_budget_records_the_choice_and_both_peaks(tmp_path, capsys):
    flags = ["--epochs", "1", "--output", str(tmp_path), "--experiment", "run", "--batch-size", "64", "--seed", "1"]
    assert main(["train", *flags, "--budget", "17MiB"]) == 0
    settings = (tmp_path / "run" / "config.yaml").read_text()
    assert "budget 17 MiB" in capsys.readouterr().out
    assert "modules: null" not in settings or "grad_checkpointing: true" in settings
    with (tmp_path / "run" / "results.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert int(row["peak_memory"]) == pytest.approx(int(row["predicted_memory"]), rel=0.03)
    assert int(row["peak_memory"]) < 17 * 2**20


def test_a_budget_never_changes_the_batch(tmp_path, capsys):
    assert main(["train", "--output", str(tmp_path), "--budget", "8MiB", "--batch-size", "128"]) == 2
    line = capsys.readouterr().err
    assert "localprop train" in line
    assert "--batch-size" in line
    assert line.count("\n") == 1


def test_flags_give_the_settings_back():
    local = LocalConfig(modules=3, split_blocks=True, recompute=False, method_kwargs={"weight": 0.5})
    words = to_flags(TrainConfig(local=local))
    assert words == ["--modules", "3", "--split-blocks", "--recompute", "False", "--method-kwargs", "weight=0.5"]


@pytest.mark.parametrize(("text", "count"), [("8GiB", 8 << 30), ("500MiB", 500 << 20), ("2g", 2 << 30), ("64", 64)])
def test_amounts_of_memory(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "0", "-1GiB", "8 apples"])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(ConfigError, match="no amount of memory"):
        parse_bytes(text)
