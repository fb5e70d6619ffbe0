"""Runs of the real command, in this process, on scikit-learn's digits with a very small Swin."""

import json
import signal
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

from localprop.cli import main
from localprop.report.losses import read_losses
from localprop.report.results import read_results
from stopped import stop_at

SMALL = [
    *["--model-kwargs", "patch_size=4", "window_size=2", "embed_dim=12", "depths=(1,1)", "num_heads=(1,2)"],
    *["--min-depth", "0", "--batch-size", "256", "--device", "cpu"],
]
CUTS = ["--cuts", "patch_embed", "layers.0"]  # given, as a balanced partition takes longer to find than all the rest
EPOCHS = 2
STEPS_PER_EPOCH = 5
# Everything that could make a resumed run differ: dropped paths, mixed labels, clipping, a moving average.
LIVELY = ["--drop-path", "0.2", "--mixup", "0.2", "--clip-grad", "1", "--model-ema", "--model-ema-decay", "0.9"]


def train(output: Path, *flags: str) -> int:
    return main(
        ["train", *SMALL, *CUTS, "--epochs", str(EPOCHS), "--output", str(output), "--experiment", "run", *flags]
    )


def final_weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "run" / "model.safetensors")


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def assert_same_results(output: Path, other: Path) -> None:
    for a, b in zip(*(read_results(o / "run" / "results.csv") for o in (output, other)), strict=True):
        assert (a.epoch, a.step, a.train_losses, a.heads) == (
            b.epoch,
            b.step,
            b.train_losses,
            b.heads,
        )
    curves = [read_losses(o / "run" / "losses.csv") for o in (output, other)]
    assert [(row[0], *row[3:]) for row in curves[0]] == [(row[0], *row[3:]) for row in curves[1]]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of one finished run."""
    output = tmp_path_factory.mktemp("plain")
    assert train(output) == 0
    return output


@pytest.fixture(scope="module")
def lively(tmp_path_factory):
    output = tmp_path_factory.mktemp("lively")
    assert train(output, *LIVELY) == 0
    return output


def test_a_run_leaves_everything_in_its_folder(plain):
    folder = plain / "run"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("config.yaml", "run.json", "results.csv", "losses.csv", "curves.png", "model.safetensors", "checkpoints")
    }
    rows = read_results(folder / "results.csv")
    assert [row.epoch for row in rows] == [1, 2]
    assert [row.step for row in rows] == [5, 10]
    assert all(len(row.train_losses) == len(row.heads) == 3 for row in rows)
    assert rows[-1].train_losses[-1] < rows[0].train_losses[-1]
    assert len(list((folder / "checkpoints").iterdir())) == 2
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["cuts"] == ["patch_embed", "layers.0"]
    assert settings["img_size"] == 16


def test_losses_between_moments_have_the_epochs_mean(plain):
    rows, losses = read_results(plain / "run" / "results.csv"), read_losses(plain / "run" / "losses.csv")
    assert [row[0] for row in losses] == list(range(1, EPOCHS * STEPS_PER_EPOCH + 1))  # so few steps are moments all
    for row in rows:
        own = [found[3:] for found in losses[STEPS_PER_EPOCH * (row.epoch - 1) : STEPS_PER_EPOCH * row.epoch]]
        means = [sum(column) / STEPS_PER_EPOCH for column in zip(*own, strict=True)]
        assert means == pytest.approx(list(row.train_losses), rel=1e-12)


def test_evaluation_at_intervals_changes_nothing_else(plain, tmp_path, capsys):
    assert train(tmp_path, "--val-interval", "2") == 0
    assert_same(final_weights(tmp_path), final_weights(plain))
    all_rows, rows = (read_results(o / "run" / "results.csv") for o in (plain, tmp_path))
    assert [row.heads for row in rows[1:]] == [row.heads for row in all_rows[1:]]
    assert (rows[0].heads, rows[0].score("loss")) == ((None, None, None), None)
    assert rows[0].train_losses == all_rows[0].train_losses
    assert "nan" not in capsys.readouterr().out


def test_held_out_images_are_evaluated_on_and_named(tmp_path, capsys):
    assert train(tmp_path, "--val-split", "0.2", "--epochs", "1") == 0
    assert "validation accuracy" in capsys.readouterr().out
    row = read_results(tmp_path / "run" / "results.csv")[-1]
    for flags, part, images in ((["--val-split", "0.2"], "validation", 288), ([], "test", 360)):
        assert main(["eval", str(tmp_path / "run"), "--device", "cpu", *flags]) == 0
        result = json.loads(capsys.readouterr().out)
        assert (result["evaluated_on"], result["images"]) == (part, images)
        assert (result["top1"] == pytest.approx(row.headline, abs=1e-3)) == (part == "validation")


def test_weights_are_a_plain_timm_checkpoint(plain, capsys):
    description = json.loads((plain / "run" / "run.json").read_text())
    model = timm.create_model(description["model"], **description["model_kwargs"])
    model.load_state_dict(final_weights(plain), strict=True)
    capsys.readouterr()
    assert main(["eval", str(plain / "run"), "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    row = read_results(plain / "run" / "results.csv")[-1]
    assert result["top1"] == pytest.approx(row.headline, abs=1e-3)
    assert result["loss"] == pytest.approx(row.score("loss"), abs=1e-4)


def test_the_moving_average_is_what_is_evaluated_and_saved(lively, capsys):
    capsys.readouterr()
    assert main(["eval", str(lively / "run"), "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    row = read_results(lively / "run" / "results.csv")[-1]
    assert result["top1"] == pytest.approx(row.headline, abs=1e-3)
    assert result["loss"] == pytest.approx(row.score("loss"), abs=1e-4)


def test_export_loads_in_timm_with_the_same_logits(plain, tmp_path):
    assert main(["export", str(plain / "run"), "--output", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors", "config.json"}
    exported = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    description = json.loads((plain / "run" / "run.json").read_text())
    model = timm.create_model(description["model"], **description["model_kwargs"]).eval()
    model.load_state_dict(final_weights(plain))
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(exported(images), model(images))
    settings = exported.pretrained_cfg
    assert settings["mean"] == pytest.approx(description["evaluation"]["mean"])
    assert settings["crop_pct"] == 1.0
    assert "license" not in json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
    assert main(["export", str(plain / "run"), "--output", str(tmp_path / "out")]) == 2  # never overwritten


def test_config_yaml_is_all_that_a_second_run_needs(plain, tmp_path):
    again = ["train", "-c", str(plain / "run" / "config.yaml"), "--output", str(tmp_path), "--experiment", "run"]
    assert main(again) == 0
    assert_same(final_weights(tmp_path), final_weights(plain))


@pytest.mark.parametrize(("number", "step"), [*((signal.SIGTERM, step) for step in (1, 5, 6)), (signal.SIGINT, 3)])
def test_a_signal_saves_and_the_resumed_run_equals_the_uninterrupted(lively, tmp_path, monkeypatch, number, step):
    stop_at(monkeypatch, step, STEPS_PER_EPOCH, number)
    assert train(tmp_path, *LIVELY) == 128 + number
    monkeypatch.undo()
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert_same(final_weights(tmp_path), final_weights(lively))
    assert_same_results(tmp_path, lively)


def test_exact_training_is_resumed_and_evaluated_like_any_other(tmp_path, capsys):
    exact, cut_short = (*LIVELY, "--method", "end-to-end"), tmp_path / "short"
    assert train(tmp_path, *exact) == 0
    assert "3 modules trained exactly" in capsys.readouterr().out
    assert train(cut_short, *exact, "--steps", "3") == 0
    assert main(["train", "--resume", str(cut_short / "run")]) == 0
    assert_same(final_weights(cut_short), final_weights(tmp_path))
    assert_same_results(cut_short, tmp_path)
    folder = tmp_path / "run"
    row = read_results(folder / "results.csv")[-1]
    assert len(row.train_losses) == len(row.heads) == 1
    assert row.predicted_memory == pytest.approx(row.peak_memory, rel=0.02)
    newest = max((folder / "checkpoints").iterdir())
    assert {path.name for path in newest.glob("module-*")} == {f"module-{k}.safetensors" for k in range(3)}
    capsys.readouterr()
    assert main(["eval", str(folder), "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == pytest.approx(row.headline, abs=1e-3)
    assert main(["export", str(folder)]) == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--parallel", "modules", "--nproc", "2"], "choose --parallel data"),
        (["--reach", "1"], "method end-to-end has no heads"),
    ],
)
def test_what_exact_training_does_not_have_is_refused_in_a_line(tmp_path, capsys, flags, words):
    assert train(tmp_path, "--method", "end-to-end", *flags) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_resume_without_a_folder_takes_the_newest_run(plain, capsys):
    assert main(["train", "--resume", "--output", str(plain)]) == 0
    assert "resumed from" in capsys.readouterr().out


def test_resume_passes_over_a_damaged_checkpoint_and_says_so(lively, tmp_path, monkeypatch, capsys):
    assert train(tmp_path, *LIVELY) == 0
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    (newest / "module-1.safetensors").write_bytes(b"damaged")
    capsys.readouterr()
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    output = capsys.readouterr().out.replace("\n", "")
    assert newest.name in output
    assert "step-00000005" in output
    assert_same(final_weights(tmp_path), final_weights(lively))


def test_resume_refuses_other_settings(plain, capsys):
    assert main(["train", "--resume", str(plain / "run"), "--lr", "5"]) == 2
    assert "--lr was 0.003" in capsys.readouterr().err


def test_a_second_run_never_writes_into_an_old_folder(plain, capsys):
    before = (plain / "run" / "model.safetensors").stat().st_mtime_ns
    assert train(plain) == 2
    assert "exists already" in capsys.readouterr().err
    assert (plain / "run" / "model.safetensors").stat().st_mtime_ns == before


def test_a_non_finite_loss_stops_before_the_step_and_names_the_module(tmp_path, capsys):
    assert train(tmp_path, "--lr", "1e30", "--sched", "none") == 2
    error = capsys.readouterr().err
    assert "module 1 of 3" in error
    assert "at step 2" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("method", ["end-to-end", "greedy", "infopro", "feature-reconstruction"])
def test_every_method_trains_in_mixed_precision(tmp_path, method):
    cuts = [] if method == "end-to-end" else CUTS
    flags = [*SMALL, "--epochs", "1", "--amp", "--method", method, *cuts]
    assert main(["train", *flags, "--output", str(tmp_path), "--experiment", "run"]) == 0
    (row,) = read_results(tmp_path / "run" / "results.csv")
    assert len(row.train_losses) == (1 if method == "end-to-end" else 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("flags", [[], ["--amp"], ["--amp", "--amp-dtype", "float16"]])
def test_trains_on_cuda(tmp_path, flags):
    assert train(tmp_path, "--device", "cuda", *flags) == 0
    rows = read_results(tmp_path / "run" / "results.csv")
    assert rows[-1].train_losses[-1] < rows[0].train_losses[-1]
