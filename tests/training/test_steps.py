"""`train --steps N`: a run that stops early has all that a finished one has, and resumes as if it had never stopped."""

import json
import os
import shutil
import signal

import pytest
from PIL import Image
from safetensors.torch import load_file

from localprop.bench.collect import collect, differing, settings_in
from localprop.bench.record import write_record
from localprop.bench.suite import load_suite
from localprop.cli import main
from localprop.errors import BenchError
from localprop.report.curves import draw_curves
from localprop.report.losses import MOMENTS, LossCurve, read_losses
from localprop.report.results import read_results
from localprop.settings.flat import to_flags
from localprop.training import trainer
from localprop.training.checkpoints.loading import load_checkpoint
from localprop.training.checkpoints.parts import whole_weights
from ranks import assert_same_run, flags
from stopped import stop_at

EPOCH, WHOLE = 5, 15  # steps


def train(output, *more):
    return main(["train", *flags(output, 3), "--epochs", "3", *more])


def resume(output, *more):
    return main(["train", "--resume", str(output / "run"), *more])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    assert train(output) == 0
    return output


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Stopped after the second step of the second epoch."""
    output = tmp_path_factory.mktemp("stopped")
    assert train(output, "--steps", "7") == 0
    return output


@pytest.fixture
def copy(stopped, tmp_path):
    shutil.copytree(stopped / "run", tmp_path / "run")
    return tmp_path


def test_everything_is_there_that_the_end_of_a_run_has(stopped, whole, capsys):
    folder = stopped / "run"
    assert {path.name for path in folder.iterdir()} == {path.name for path in (whole / "run").iterdir()}
    rows, losses = read_results(folder / "results.csv"), read_losses(folder / "losses.csv")
    assert [(row.epoch, row.step) for row in rows] == [(1, 5), (2, 7)]
    assert [row[0] for row in losses] == list(range(1, 8))
    assert list(rows[-1].train_losses) == pytest.approx([(a + b) / 2 for a, b in zip(*losses[5:], strict=True)][3:])
    assert rows[-1].examples_per_second == pytest.approx(512 / sum(row[1] for row in losses[5:]))
    checkpoint = load_checkpoint(max((folder / "checkpoints").iterdir()))
    assert checkpoint.step == 7
    weights = load_file(folder / "model.safetensors")
    assert all(weights[name].equal(value) for name, value in whole_weights(checkpoint.parts).items())
    assert main(["eval", str(folder), "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == pytest.approx(rows[-1].headline, abs=1e-3)


def test_the_learning_rate_is_that_of_the_whole_run(stopped, whole):
    assert read_results(stopped / "run" / "results.csv")[0].lr == read_results(whole / "run" / "results.csv")[0].lr
    assert read_losses(stopped / "run" / "losses.csv")[6][3:] == read_losses(whole / "run" / "losses.csv")[6][3:]


def test_resumed_with_more_steps_and_then_without_it_equals_the_uninterrupted(copy, whole):
    assert resume(copy, "--steps", "10") == 0  # an epoch's end
    assert [row.step for row in read_results(copy / "run" / "results.csv")] == [5, 10]
    assert resume(copy, "--steps", "11") == 0
    assert [row.step for row in read_results(copy / "run" / "results.csv")] == [5, 10, 11]
    assert resume(copy) == 0
    assert_same_run(copy, whole)


def test_a_run_that_was_interrupted_stops_at_the_same_step(stopped, tmp_path, monkeypatch, capsys):
    stop_at(monkeypatch, 3, EPOCH)
    assert train(tmp_path, "--steps", "7") == 143
    monkeypatch.undo()
    assert f"--resume {tmp_path / 'run'} --steps 7" in capsys.readouterr().err
    assert resume(tmp_path, "--steps", "7") == 0
    assert_same_run(tmp_path, stopped)
    table = capsys.readouterr().out
    assert f"Stopped after step 7 of 15. Train on:\n\nlocalprop train --resume {tmp_path / 'run'}\n" in table


@pytest.mark.parametrize("steps", ["5", "7"])
def test_a_run_that_ended_before_its_last_evaluation_is_evaluated(stopped, tmp_path, monkeypatch, steps):
    monkeypatch.setattr(trainer.Trainer, "evaluate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, "--steps", steps, "--val-interval", "3")
    monkeypatch.undo()
    assert (tmp_path / "run" / "results.csv").exists() == (steps == "7")  # of the first epoch
    assert resume(tmp_path, "--steps", steps) == 0
    row, expected = (read_results(o / "run" / "results.csv")[-1] for o in (tmp_path, stopped))
    assert row.step == int(steps)
    assert steps == "5" or row.heads == expected.heads


def test_a_stopped_run_resumed_with_the_same_steps_stays_as_it_is(copy, stopped):
    assert resume(copy, "--steps", "7") == 0
    assert_same_run(copy, stopped)


def test_weights_of_an_earlier_stop_are_not_taken_for_the_runs(copy, monkeypatch, capsys):
    stop_at(monkeypatch, 9, EPOCH)
    assert resume(copy) == 143
    monkeypatch.undo()
    capsys.readouterr()
    assert main(["eval", str(copy / "run"), "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"].endswith("step-00000009")


def pets(tmp_path):
    """Flags for a folder of small images that has test/ and val/."""
    for part, count in (("train", 8), ("val", 2), ("test", 3)):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / part / name).mkdir(parents=True)
            for value in range(count):
                grey = 16 * value + 90 * (name == "cat")
                Image.new("L", (8, 8), grey).save(tmp_path / "pets" / part / name / f"{value}.png")
    return ["--data", f"folder:{tmp_path / 'pets'}", "--img-size", "16", "--batch-size", "4"]


def test_test_images_are_evaluated_again_when_training_has_continued(tmp_path):
    found, data = [], pets(tmp_path)
    for more in (["--steps", "1"], ["--steps", "1"], []):
        assert (resume(tmp_path, *more) if found else train(tmp_path, *data, *more)) == 0
        found.append(json.loads((tmp_path / "run" / "run.json").read_text())["test"])
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("more", [[], ["--steps", "6"]])
def test_a_signal_during_the_evaluation_of_test_images_leaves_a_checkpoint_of_the_end(
    tmp_path, monkeypatch, capsys, more
):
    evaluate = trainer.Trainer.evaluate

    def interrupted(self, data=None):
        if data:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, data)

    monkeypatch.setattr(trainer.Trainer, "evaluate", interrupted)
    assert train(tmp_path, *pets(tmp_path), *more) == 143
    monkeypatch.undo()
    capsys.readouterr()
    assert resume(tmp_path, *more) == 0
    newest = f"step-000000{6 if more else 12:02}"
    assert f"resumed from {tmp_path / 'run' / 'checkpoints' / newest}" in capsys.readouterr().out.replace("\n", "")
    assert "test" in json.loads((tmp_path / "run" / "run.json").read_text())


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--steps", "16"], "--steps is 16, but --epochs 3 come to 15 steps; choose fewer steps, or more epochs"),
        (["--steps", "0"], "--steps is 0; it must be at least 1"),
    ],
)
def test_steps_that_cannot_be_are_one_line(tmp_path, capsys, more, line):
    assert train(tmp_path, *more) == 2
    assert capsys.readouterr().err == f"localprop: {line}\n"
    assert not (tmp_path / "run").exists()


def test_fewer_steps_than_there_have_been_are_one_line(copy, capsys):
    before = {path: path.read_bytes() for path in (copy / "run").glob("*.*")}
    assert resume(copy, "--steps", "6") == 2
    line = f"--steps is 6, but {copy / 'run'} is at step 7 already; choose more --steps, or leave them out"
    assert capsys.readouterr().err == f"localprop: {line}\n"
    assert before == {path: path.read_bytes() for path in (copy / "run").glob("*.*")}


def test_the_curve_has_the_last_step_wherever_a_run_stops(tmp_path):
    curve = LossCurve(steps=10 * MOMENTS, modules=1)
    for step in range(1, 16):
        curve.add(step, [float(step)], 1.0, 1.0)
    curve.write(tmp_path / "losses.csv", 15)
    assert read_losses(tmp_path / "losses.csv") == [[10, 1, 1, 5.5], [15, 1, 1, 13.0]]
    assert len(curve.state()["rows"]) == 1  # where the run continues, moments are where they would have been


def test_an_epoch_that_was_cut_short_is_drawn_as_its_part(stopped, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("localprop.report.curves._draw_panel", lambda axes, epochs, *_: drawn.append(list(epochs)))
    draw_curves(tmp_path / "curves.png", read_results(stopped / "run" / "results.csv"), "", steps_per_epoch=EPOCH)
    assert drawn == [[1, 1.4], [1, 1.4]]


def suite(folder, steps):
    path = folder / "mine.yaml"
    settings = ("model_kwargs: {patch_size: 4, window_size: 2, embed_dim: 12, depths: [1, 1], num_heads: [1, 2]}",)
    lines = [*settings, "method: greedy", "batch_size: 256", "epochs: 2", "modules: 2", "min_depth: 0", *steps]
    path.write_text("runs: [{}]\nsettings:\n  " + "\n  ".join(lines))
    return load_suite(str(path))


def test_a_suite_may_stop_its_runs_and_its_results_say_so(tmp_path, capsys):
    (run,) = suite(tmp_path, ["steps: 3"]).runs
    folder = tmp_path / "out" / "runs" / run.name
    assert main(["train", *to_flags(run.config), "--output", str(folder.parent), "--experiment", run.name]) == 0
    record = collect(folder, "mine", run, 1)
    assert (record.result["steps"], record.config["steps"]) == (3, 3)
    assert record.result["curve"]["step"] == [1, 2, 3]
    assert differing(settings_in(folder, run), run) is None
    write_record(tmp_path / "out" / f"{run.name}.json", record)
    for other, line in (([], "ends with step 3 of 10"), (["steps: 4"], "ends with step 3 of 4")):
        with pytest.raises(BenchError, match=line):
            collect(folder, "mine", suite(tmp_path, other).runs[0], 1)
    capsys.readouterr()
    assert main(["bench", str(tmp_path / "mine.yaml"), "--output", str(tmp_path / "out"), "--set", "steps=4"]) == 2
    assert "steps is 4 in the suite, and 3 there" in capsys.readouterr().err
