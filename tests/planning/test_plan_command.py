"""The command that tells a plan."""

import json
import re
import shlex

import matplotlib.image
import numpy as np
import pytest

from localprop.cli import main
from localprop.errors import ConfigError
from localprop.planning.steps import PARTS
from localprop.settings.config import LocalConfig, ModelConfig, OptimConfig, TrainConfig
from localprop.settings.flags import parse
from localprop.settings.flat import to_flags
from localprop.settings.plan import PlanConfig
from localprop.settings.values import parse_bytes

MIB = 2**20


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 * 2**30), ("500MiB", 500 * MIB), ("2G", 2**31), ("1.5 gb", 3 * 2**29), ("64k", 2**16), ("1000", 1000)],
)
def test_amounts_of_memory(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "8GiBs", "-1G", "0", "G", "1e9"])
def test_no_amount_of_memory_is_an_error_of_one_line(text, capsys):
    with pytest.raises(ConfigError, match="is no number of bytes; write 8GiB or 500MiB"):
        parse_bytes(text)
    for command in ("plan", "train"):
        assert main([command, f"--budget={text}"]) == 2
        error = capsys.readouterr().err
        assert "is no number of bytes" in error
        assert error.count("\n") == 1


KWARGS = ["img_size=32", "patch_size=4", "depth=2", "embed_dim=32", "num_heads=2"]
MODEL = ["--model", "test_vit", "--model-kwargs", *KWARGS, "--num-classes", "5", "--method", "greedy"]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs `localprop plan`; gives its report and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*flags):
        assert main(["plan", *MODEL, *flags, "--json", "plan.json"]) == 0
        return json.loads((tmp_path / "plan.json").read_text()), capsys.readouterr().out

    return run


def test_the_command_writes_a_table_a_picture_and_a_report(command, tmp_path):
    report, text = command("--batch-size", "64")
    assert [row["setting"] for row in report["rows"]] == ["end-to-end", "end-to-end + ckpt", "K=2, max"]
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    for row in report["rows"]:
        assert sum(row[part] for part in PARTS) == row["peak"]
        (line,) = [line for line in lines if re.match(re.escape(row["setting"]) + r" {2,}", line)]
        numbers = re.findall(r"\S+", line.removeprefix(row["setting"]))
        assert numbers[0] == f"{row['peak'] / MIB:.0f}"
        assert numbers[1] == f"{100 * row['memory_ratio']:.0f}"
        assert numbers[-1] == (str(row["peak_module"]) if row["modules"] > 1 else f"{row['time_ratio']:.2f}")
    assert report["config"]["batch_size"] == 64
    assert "choice" not in report
    for kind in ("exact", "local"):
        assert f"{kind}, the fastest" in text
        assert len(report[kind]) >= 2
        assert all(row["setting"] in text for row in report[kind])
    assert "left out, since the model has too few blocks: K=4, K=8" in text
    assert all("modules asked for" in why for why in report["left_out"].values())
    assert "localprop train" not in text
    assert "picture: plan.png" in lines
    pixels = matplotlib.image.imread(tmp_path / "plan.png")
    assert pixels.shape[:2] == (1400, 1400)
    assert (pixels[:, [0, 1, -2, -1]] == 1).all(), "something runs into the edge"
    upper, lower = (part.reshape(-1, 4)[:, :3] for part in (pixels[150:430, 120:1150], pixels[510:780, 120:1150]))
    colors = [np.unique(p[np.ptp(p, axis=1) > 0.1] @ [1, 256, 256**2], return_counts=True)[1] for p in (upper, lower)]
    assert (colors[0] > 500).sum() == 0  # end-to-end is grey
    assert (colors[1] > 500).sum() == 2  # a colour for each module


def test_the_command_explains_a_peak(command):
    report, text = command("--batch-size", "64", "--explain", "K=2")
    peak = report["explained"]
    (row,) = [row for row in report["rows"] if row["setting"] == peak["setting"]]
    parts = peak["tensors"] + peak["rest"]
    assert sum(part["size"] for part in parts) == peak["size"] == row["peak"]
    assert (peak["module"], peak["modules"]) == (row["peak_module"], 2)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert "K=2, max is at its peak of" in text
    assert f"module {peak['module']} of 2, in the {peak['phase']} of {peak['layer']}" in " ".join(text.split())
    start = next(i for i, line in enumerate(lines) if line.startswith("made by"))
    end = next(i for i, line in enumerate(lines) if line.startswith("in all"))
    shares = [float(re.findall(r" (\d+\.\d) ", line)[-1]) for line in lines[start + 1 : end]]
    assert len(shares) == len(parts)
    assert sum(shares) == pytest.approx(100)
    for tensor, line in zip(peak["tensors"], lines[start + 1 :], strict=False):
        assert line.startswith(tensor["layer"])
        assert "x".join(map(str, tensor["shape"])) in line


CONFIGS = [
    TrainConfig(),
    TrainConfig(
        ModelConfig("test_vit", {"depth": 3, "global_pool": "avg", "depths": (1, 2), "norm": "1", "pool": ""}),
        LocalConfig("greedy", 3, recompute=False, split_blocks=True, grad_checkpointing=True, budget="2GiB"),
        optim=OptimConfig(amp=True, clip_grad=0.5, lr=1e-4, warmup_epochs=0),
    ),
    TrainConfig(local=LocalConfig(cuts=("layers.0", "layers.1"), recompute=True, method_kwargs={"weight": 0.5})),
    TrainConfig(
        ModelConfig("resnet18", {"a": "None", "b": "x=1"}), LocalConfig("end-to-end", method_kwargs={"x": None})
    ),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_flags_give_the_settings_that_they_are_made_of(config):
    words = shlex.split(shlex.join(to_flags(config)))
    assert parse(TrainConfig, "train", words, TrainConfig()) == config


@pytest.mark.parametrize(
    "flags",
    [
        ("--batch-size", "8", "--budget", "1MiB"),
        (
            "--batch-size",
            "8",
            "--budget",
            "9MiB",
            "--modules",
            "2",
            "--precision",
            "bf16",
            "--opt",
            "lion",
            "--model-ema",
        ),
    ],
)
def test_the_printed_command_trains_what_was_chosen(command, flags):
    report, text = command(*flags)
    lines, choice = text.splitlines(), report["choice"]
    for kind in ("exact", "local"):
        fit = report[f"{kind}_fit"]
        (told,) = [line for line in lines if f", {kind}: {fit['setting']}" in line]
        assert fit["command"] + " --data folder:PATH" in lines[lines.index(told) + 1 :]
    line = choice["command"]
    words = shlex.split(line)
    assert words[:2] == ["localprop", "train"]
    config = parse(TrainConfig, "train", words[2:], TrainConfig())
    plan_config = parse(PlanConfig, "plan", [*MODEL, *flags], PlanConfig())
    assert choice["peak"] <= report["budget"] == parse_bytes(plan_config.local.budget)
    assert config.backbone == plan_config.backbone
    assert config.local.budget is None
    assert config.optim.batch_size == choice["batch_size"]
    assert (config.local.method, config.local.count or 1) == (choice["method"], choice["modules"])
    assert config.local.grad_checkpointing == choice["grad_checkpointing"]
    assert config.local.split_blocks == choice["split_blocks"]
    assert (config.local.cuts, config.local.recompute_units) == (
        tuple(choice["cuts"]) if "cuts" in choice else None,
        choice.get("recompute_units"),
    )
    assert (config.optim.opt, config.optim.model_ema) == (plan_config.opt, plan_config.model_ema)
    assert config.optim.amp == (plan_config.precision != "fp32")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--modules", "7"], "at most 2"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--model", "test_vitt"], "did you mean 'test_vit'"),
        (["--picture", "nowhere/plan.png"], "no folder"),
        (["--bugdet", "1G"], "did you mean '--budget'"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *MODEL, *flags]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
