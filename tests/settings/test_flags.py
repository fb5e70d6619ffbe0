"""Values of flags and of files of settings: what is impossible is one line, and ends with exit code 2."""

import pytest
import torch
import tyro

from localprop.cli import main
from localprop.errors import ConfigError
from localprop.settings.bench import BenchConfig
from localprop.settings.bounds import BOUNDS
from localprop.settings.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from localprop.settings.flags import parse
from localprop.settings.flat import free, from_flat, to_flat
from localprop.settings.plan import PlanConfig
from localprop.settings.values import parse_bytes, parse_duration


def line_of(words, capsys):
    """The one line with which a command refuses its flags."""
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("localprop: ")
    assert captured.err.count("\n") == 1
    assert len(captured.err) < 300
    return captured.err


FLOATS = [name for name, value in to_flat(TrainConfig()).items() if isinstance(value, float)]
FLOATS += ["hflip", "warmup_epochs", "clip_grad"]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", FLOATS)
def test_no_setting_is_nan_or_infinite(name, value, tmp_path, capsys):
    line = line_of(["train", f"--{name.replace('_', '-')}={value}"], capsys)
    assert f"--{name.replace('_', '-')} is {value}" in line
    file = tmp_path / "settings.yaml"
    file.write_text(f"{name}: {value.replace('nan', '.nan').replace('inf', '.inf')}\n")
    line = line_of(["train", "-c", str(file)], capsys)
    assert f"settings.yaml: --{name.replace('_', '-')} is {value}" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train --model-ema-decay 7", "--model-ema-decay is 7.0; it must be at least 0 and below 1"),
        ("train --model-ema-decay 1", "--model-ema-decay is 1.0; it must be at least 0 and below 1"),
        ("train --drop-path -1", "--drop-path is -1.0; it must be at least 0 and below 1"),
        ("chain resnet18 --drop-path 1", "--drop-path is 1.0; it must be at least 0 and below 1"),
        ("plan --drop-path nan", "--drop-path is nan"),
        (
            f"train --seed {10**30}",
            "--seed is a number of more than 24 digits; it must be between -9223372036854775808",
        ),
        (f"train --seed {2**64}", "--seed is 18446744073709551616; it must be between"),
        (f"train --seed {10**400}", "--seed is a number of more than 24 digits; it must be between"),
        (f"plan --num-classes {10**400}", "--num-classes is a number of more than 24 digits"),
        (f"train --epochs {10**30}", "--epochs is a number of more than 24 digits; it must be at most 1000000000"),
        ("train --hflip 1.5", "--hflip is 1.5; it must be between 0 and 1"),
        ("train --val-split 1", "--val-split is 1.0; it must be at least 0 and below 1"),
        ("train --crop-pad -4", "--crop-pad is -4; it must be at least 0"),
        ("train --min-lr -1e-3", "--min-lr is -0.001; it must be at least 0"),
        ("train --clip-grad 0", "--clip-grad is 0.0; it must be above 0"),
        ("train --method-kwargs weight=1e999", "--method-kwargs has weight=inf; its numbers must be finite"),
        ("train --device meta", "--device 'meta': this machine has a cpu"),
        ("train --device hpu", "--device 'hpu': this machine has a cpu"),
        ("train --budget inf", "--budget 'inf' is no number of bytes"),
        (f"plan --budget {'9' * 400}", "is no number of bytes"),
        ("plan --parallel modules --nproc 2 --bandwidth nan", "--bandwidth 'nan' is no number of bytes"),
        ("bench smoke --time-limit inf", "--time-limit 'inf' is no time"),
        ("bench smoke --jobs 0", "--jobs is 0; it must be at least 1"),
        ("bench smoke --set lr=1e999", "--set has lr=inf; its numbers must be finite"),
    ],
)
def test_values_out_of_bounds(words, said, capsys):
    assert said in line_of(words.split(), capsys)


def test_every_number_that_a_flag_takes_has_bounds():
    for config in (TrainConfig(), PlanConfig(), BenchConfig(suite="smoke")):
        for name, value in to_flat(config).items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                assert name in BOUNDS


def test_bounds_are_those_of_torch():
    for seed in (-(2**63), 2**64 - 1):
        torch.Generator().manual_seed(seed)
        assert from_flat({"seed": seed}, "here").run.seed == seed
    for seed in (-(2**63) - 1, 2**64):
        with pytest.raises((RuntimeError, ValueError, OverflowError)):
            torch.Generator().manual_seed(seed)
        with pytest.raises(ConfigError, match="--seed"):
            from_flat({"seed": seed}, "here")


@pytest.mark.parametrize(("kind", "value"), [(OptimConfig, {"lr": 0.0}), (DataConfig, {"hflip": 1.0})])
def test_bounds_themselves_are_allowed(kind, value):
    assert kind(**value)


def test_code_meets_the_same_bounds():
    with pytest.raises(ConfigError, match="--drop-path is 2"):
        ModelConfig(drop_path=2)
    for value in (10**400, 10**9000):  # no float at all
        with pytest.raises(ConfigError, match="here: lr is") as caught:
            from_flat({"lr": value}, "here")
        assert len(str(caught.value)) < 120
    for text in ("9" * 5000, "1e9", "²"):
        with pytest.raises(ConfigError, match="bytes"):
            parse_bytes(text)
        with pytest.raises(ConfigError, match="time"):
            parse_duration(text)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train --lr abc", "--lr is 'abc'; it must be a number"),
        ("train --lr=", "--lr is ''; it must be a number"),
        ("train --batch_size x", "--batch_size is 'x'; it must be a whole number"),
        ("train --model resnet18 --epochs 1.5", "--epochs is '1.5'; it must be a whole number"),
        ("train --lr", "--lr needs a value: a number"),
        ("train --lr --epochs 3", "--lr needs a value: a number"),
        ("train --partition stages", "--partition is 'stages'; did you mean 'stage'?"),
        ("train --partition x", "--partition is 'x'; it must be balanced, compute or stage"),
        ("train --recompute maybe", "--recompute is 'maybe'; it must be auto, True or False"),
        ("train --parallel both", "--parallel is 'both'; it must be modules or data"),
        ("train --model-kwargs depth:3", "--model-kwargs is 'depth:3'; it must be KEY=VALUE"),
        ("train --warmup-epochs one", "--warmup-epochs is 'one'; it must be a number"),
        ("plan --precision fp64", "--precision is 'fp64'; did you mean 'fp"),
        ("eval", "RUN is missing; write it without a flag"),
        ("export --output x", "RUN is missing"),
        ("bench report", "FOLDER is missing"),
        ("eval run --batch-size many", "--batch-size is 'many'; it must be a whole number"),
        ("trian", "no command is called 'trian'; did you mean 'train'?"),
        ("train --learning-rate 1", "train has no option '--learning-rate'"),
    ],
)
def test_flags_that_cannot_be_read(words, said, capsys):
    assert said in line_of(words.split(), capsys)


def test_what_is_not_foreseen_is_the_first_sentence_of_the_box(monkeypatch, capsys):
    def cli(*_, **__):
        import sys

        print("╭─ Strange ─╮\n│ something strange │\n│ and long │\n│ ───── │\n│ help │\n╰───╯", file=sys.stderr)
        raise SystemExit(2)

    monkeypatch.setattr(tyro, "cli", cli)
    assert line_of(["train"], capsys) == "localprop: something strange and long; see localprop train --help\n"


def test_help_is_shown_as_ever(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--lr", "abc", "--help"])
    assert not stop.value.code
    captured = capsys.readouterr()
    assert "Peak learning rate" in captured.out
    assert captured.err == ""


def test_flags_that_are_right_are_read():
    words = ["--lr", "1", "--cuts", "a", "b", "--model-kwargs", "depth=2", "--amp", "--no-download", "--hflip", "None"]
    config = parse(TrainConfig, "train", words)
    assert (config.optim.lr, config.local.cuts, config.backbone.model_kwargs) == (1.0, ("a", "b"), {"depth": 2})
    assert (config.optim.amp, config.data.hflip) == (True, None)


def test_settings_that_are_free_somewhere_exist():
    for where in ("resume", "config", "record", "processes"):
        assert free(where)
        assert free(where) <= to_flat(TrainConfig()).keys()
