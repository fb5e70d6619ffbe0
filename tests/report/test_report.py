"""The report: what a person sees of a training run."""

import dataclasses
import io
import math
import re

import matplotlib.image
import numpy as np
import pytest
import timm
import torch
from rich.console import Console
from safetensors.torch import save_file

from localprop.errors import CheckpointError
from localprop.report.curves import draw_curves
from localprop.report.formats import format_bytes, format_duration, format_loss, format_speed
from localprop.report.progress import Pace, Progress
from localprop.report.results import EpochRow, read_results, write_results
from localprop.report.summary import final_table, next_steps

STEPS = 5


@pytest.fixture(autouse=True)
def _no_surroundings(monkeypatch):
    """What a shell or a CI service sets must not decide how these tests see the display."""
    for name in ("CI", "COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def make_rows(modules, epochs, heads=True):
    depth = np.arange(1, modules + 1) / modules
    return [
        EpochRow(
            epoch=epoch,
            step=epoch * STEPS,
            lr=1e-3 / 3,
            train_losses=tuple((2.3 / epoch**0.5 - depth / 3).tolist()),
            heads=tuple(float(90 * d * (1 - 0.5**epoch)) if heads or d == 1 else None for d in depth),
            network=(90 * (1 - 0.5**epoch), None if epoch % 2 else 99.5, 1 / epoch),
            examples_per_second=1234.5,
            predicted_memory=3 * 2**29 + 10 * 2**20 + epoch,
            peak_memory=3 * 2**29,
            seconds=epoch * 61.7,
        )
        for epoch in range(1, epochs + 1)
    ]


def run(progress, rows, first=1):
    with progress:
        progress.note("resumed from runs/a[b]")
        for row in rows[first - 1 :]:
            for step in range(1, STEPS + 1):
                progress.step(row.epoch, step, [loss + 0.5 for loss in row.train_losses], 2**20)
            progress.epoch(row)


def terminal(width):
    return Console(force_terminal=True, file=io.StringIO(), width=width)


def frames(console):
    """What the terminal was sent, without styles and cursor movements, line by line."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue())
    return re.split(r"\n|\r|\x1b\[[0-9;?]*[A-Za-z]", text)


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("modules", [1, 3, 16])
def test_results_round_trip_bit_for_bit(tmp_path, modules, heads):
    rows = make_rows(modules, 4, heads)
    path = tmp_path / "results.csv"
    write_results(path, rows)
    assert read_results(path) == rows
    assert [p.name for p in tmp_path.iterdir()] == ["results.csv"]
    header, *lines = path.read_text().splitlines()
    assert header.startswith("epoch,step,lr,train_loss_1")
    assert f"train_loss_{modules},test_acc_1" in header
    assert len(lines) == 4


def test_memory_may_be_unknown(tmp_path):
    """A run of one step has no measurement, and what fake tensors cannot run no prediction."""
    rows, path = make_rows(2, 4), tmp_path / "results.csv"
    for i, unknown in enumerate([{"predicted_memory": None}, {"peak_memory": None}, {}]):
        rows[i] = dataclasses.replace(rows[i], **unknown)
    write_results(path, rows)
    assert read_results(path) == rows
    shown = []
    for row in (rows[0], rows[1], dataclasses.replace(rows[1], predicted_memory=None)):
        console = Console(file=io.StringIO(), width=80)
        console.print(final_table([row], ["a", "b"]))
        shown.append(re.search(r"peak memory +(.*?) *\n", console.file.getvalue())[1])
    assert shown == ["1.50 GiB measured", "1.51 GiB predicted", "-"]
    output = Console(file=io.StringIO(), width=80)
    run(Progress(output, 4, STEPS, 32, 2), rows)
    assert [line.count("GiB") for line in output.file.getvalue().splitlines()[1:]] == [1, 0, 1, 1]


def test_resume_drops_the_rows_after_the_checkpoint(tmp_path):
    rows, path = make_rows(2, 5), tmp_path / "results.csv"
    write_results(path, rows)
    kept = [row for row in read_results(path) if row.epoch <= 3]
    again = dataclasses.replace(rows[3], seconds=7000.0)
    write_results(path, [*kept, again])
    assert read_results(path) == [*rows[:3], again]


@pytest.mark.parametrize("damage", [lambda text: text[:-20], lambda text: text.replace("15,", "x,", 1)])
def test_damaged_results_name_the_line(tmp_path, damage):
    path = tmp_path / "results.csv"
    write_results(path, make_rows(2, 3))
    path.write_text(damage(path.read_text()))
    with pytest.raises(CheckpointError, match=r"results\.csv line 4"):
        read_results(path)


def test_missing_results(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read results from .*results\.csv"):
        read_results(tmp_path / "results.csv")


@pytest.mark.parametrize("modules", [1, 2, 4, 8, 16])
def test_curves_show_every_module(tmp_path, modules):
    """As many line colours as modules: each line is drawn and none hides behind another."""
    path = tmp_path / "curves.png"
    draw_curves(path, make_rows(modules, 6), "infopro, vit_tiny_patch16_224")
    pixels = matplotlib.image.imread(path)
    assert pixels.shape == (560, 1400, 4)
    assert (pixels[:, [0, 1, -2, -1]] == 1).all(), "something runs into the edge"
    for panel in (pixels[120:480, 80:560], pixels[120:480, 780:1240]):
        rgb = panel.reshape(-1, 4)[:, :3]
        saturated = rgb[np.ptp(rgb, axis=1) > 0.05]
        _, counts = np.unique(saturated @ [1, 256, 256**2], return_counts=True)
        assert (counts > 100).sum() >= modules
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]


@pytest.mark.parametrize(("modules", "epochs", "heads"), [(1, 1, True), (8, 1, True), (4, 3, False)])
def test_curves_of_odd_runs(tmp_path, modules, epochs, heads):
    """One epoch shows points; modules without heads have a loss all the same."""
    draw_curves(tmp_path / "curves.png", make_rows(modules, epochs, heads), "greedy, vit_tiny_patch16_224")
    pixels = matplotlib.image.imread(tmp_path / "curves.png")
    for left in (80, 780):
        panel = pixels[120:480, left : left + 530, :3]
        assert (panel.max(2) - panel.min(2) > 0.05).sum() > 50


def test_longest_labels_stay_in_the_picture(tmp_path):
    rows = make_rows(24, 2)
    losses = tuple(3e-4 * (k + 1) for k in range(24))
    rows[1] = dataclasses.replace(rows[1], train_losses=losses, heads=(100.0,) * 24)
    draw_curves(tmp_path / "curves.png", rows, "greedy, vit_tiny_patch16_224")
    pixels = matplotlib.image.imread(tmp_path / "curves.png")
    assert (pixels[:, -3:] == 1).all()


def test_plain_output_is_a_line_per_epoch():
    rows, console = make_rows(16, 3), Console(file=io.StringIO(), width=80)
    run(Progress(console, 3, STEPS, 32, 16), rows)
    text = console.file.getvalue()
    assert "\x1b" not in text
    assert "\r" not in text
    note, *lines = text.splitlines()
    assert note == "resumed from runs/a[b]"
    assert [line[:9] for line in lines] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    for row, line in zip(rows, lines, strict=True):
        assert re.findall(r"\d+\.\d{3}\b", line) == [f"{loss:.3f}" for loss in row.train_losses]
        assert f"{row.heads[-1]:.2f}%" in line
        assert "1234 images/s  1.50 GiB" in line
    assert len({line.index("images/s") for line in lines}) == 1
    assert lines[0].endswith("left")
    assert lines[2].endswith("in 3:05")


def test_ci_gets_plain_lines_even_on_a_terminal(monkeypatch):
    monkeypatch.setenv("CI", "true")
    console = terminal(80)
    run(Progress(console, 2, STEPS, 32, 4), make_rows(4, 2))
    assert "\x1b" not in console.file.getvalue()
    assert len(console.file.getvalue().splitlines()) == 3


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("modules", [1, 4, 16])
def test_terminal_display_fits_and_cuts_no_number(modules, width):
    rows, console = make_rows(modules, 3), terminal(width)
    run(Progress(console, 3, STEPS, 32, modules), rows)
    lines = frames(console)
    assert max(map(len, lines)) <= width
    assert "…" not in console.file.getvalue()
    start = max(k for k, line in enumerate(lines) if "epoch" in line)
    frame = [line for line in lines[start:] if line.strip()]
    assert all(line.startswith(("epoch", "loss", "test")) for line in frame), "a line was wrapped"
    last = " ".join(frame)
    assert "epoch 3/3" in last
    for loss, accuracy in zip(rows[-1].train_losses, rows[-1].heads, strict=True):
        assert f" {loss:.3f}" in last
        assert f" {accuracy:.2f}" in last


def test_terminal_shows_the_mean_loss_of_the_epoch_and_stays_calm(monkeypatch):
    clock = iter(np.arange(0, 1000, 0.01))
    monkeypatch.setattr("localprop.report.progress.time.monotonic", lambda: float(next(clock)))
    console = terminal(80)
    with Progress(console, 1, 1000, 32, 2) as progress:
        for step in range(1, 500):
            progress.step(1, step, [step, -step], 2**20)
        drawn = len(re.findall("epoch 1/1", console.file.getvalue()))
    assert 30 < drawn < 45  # 5 seconds
    assert re.search(r"loss\D+250\.0 +-250\.0", " ".join(frames(console)))
    assert "3200 images/s" in console.file.getvalue()


def test_resumed_display_starts_where_the_run_was():
    rows, console = make_rows(2, 3), terminal(80)
    with Progress(console, 4, STEPS, 32, 2, rows):
        pass
    text = " ".join(frames(console))
    assert "epoch 3/4" in text
    assert f"{rows[-1].heads[-1]:.2f}" in text
    plain = Console(file=io.StringIO(), width=80)
    run(Progress(plain, 4, STEPS, 32, 2, rows), make_rows(2, 4), first=4)
    assert [line[:9] for line in plain.file.getvalue().splitlines()] == ["resumed f", "epoch 4/4"]


def test_time_left_counts_steps_and_tests():
    """An epoch is 10 steps of 2 s and a pause of 30 s, of which 20 s are the test."""
    pace, now = Pace(total=50, steps_per_epoch=10), 100.0
    assert pace.seconds_left(0, 0, True) is None
    for epoch in (1, 2):
        for _ in range(10):
            now += 2
            pace.step(epoch, now)
        pace.epoch(now + 20)
        now += 30
    assert pace.seconds_left(2, 10, True) == pytest.approx(3 * (10 * 2 + 20))
    now += 2
    pace.step(3, now)
    assert pace.seconds_left(3, 1, False) == pytest.approx(9 * 2 + 2 * 10 * 2 + 3 * 30)


def test_time_left_with_a_step_per_epoch():
    pace = Pace(total=10, steps_per_epoch=1)
    for epoch in (1, 2, 3):
        pace.step(epoch, 7.0 * epoch)
    assert pace.seconds_left(3, 1, True) == pytest.approx(7 * 7)


def test_pace_follows_a_change_of_speed():
    pace = Pace(total=10_000, steps_per_epoch=10_000)
    for now in [*np.arange(0, 100, 0.1), *np.arange(100, 600, 1.0)]:
        pace.step(1, float(now))
    assert pace.seconds_per_step == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("heads", [True, False])
def test_final_table_has_every_module(heads):
    rows = make_rows(4, 3, heads)
    rows[1] = dataclasses.replace(rows[1], heads=(*rows[1].heads[:-1], 98.76))
    names = [f"blocks.{k} ... blocks[{k}]" for k in range(4)]
    console = Console(file=io.StringIO(), width=80)
    console.print(final_table(rows, names))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    for k, (name, loss, accuracy) in enumerate(zip(names, rows[-1].train_losses, rows[-1].heads, strict=True)):
        shown = "-" if accuracy is None else f"{accuracy:.2f}"
        assert re.search(rf"{k + 1} +{re.escape(name)} +{loss:.3f} +{re.escape(shown)}", text)
    assert f"{rows[-1].headline:.2f}%, best 98.76% (epoch 2)" in text
    assert "1.50 GiB measured, 1.51 GiB predicted" in text
    assert "3:05" in text


@pytest.mark.parametrize("model_kwargs", [{}, {"embed_dim": 24, "depth": 2, "num_heads": 2, "global_pool": "avg"}])
def test_next_steps_run(tmp_path, model_kwargs):
    """The Python lines are executed as they stand, against weights of an independent timm model."""
    name = "test_vit"
    model_kwargs = {"num_classes": 3, "img_size": 32, **model_kwargs}
    torch.manual_seed(0)
    saved = timm.create_model(name, **model_kwargs).eval()
    folder = tmp_path / "a run's folder"
    folder.mkdir()
    save_file(saved.state_dict(), folder / "model.safetensors")
    console = Console(file=io.StringIO(), width=20)
    console.out(next_steps(folder, folder / "model.safetensors", name, model_kwargs), highlight=False)
    text = console.file.getvalue()
    code = text[text.index("import timm") : text.index("Train on")]
    scope = {}
    exec(code, scope)
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(scope["model"].eval()(image), saved(image))
    assert f"localprop train --data folder:PATH --model {name}" in text
    assert re.search(r"^localprop eval '.*folder'$", text, re.MULTILINE)


def test_numbers_as_text():
    assert [format_bytes(x) for x in (0, 2**20, 300 * 2**20, 2**30 - 1, 3 * 2**29)] == [
        "0.0 MiB",
        "1.0 MiB",
        "300 MiB",
        "1.00 GiB",
        "1.50 GiB",
    ]
    assert [format_duration(x) for x in (0, 59.6, 3599, 3600, 90061)] == [
        "0:00",
        "1:00",
        "59:59",
        "1:00:00",
        "1d 1:01:01",
    ]
    assert format_duration(86400) == "1d 0:00:00"
    assert [format_loss(x) for x in (0.0, 0.5, -12.3456, 123.4, 12345.6, -0.0001, 0.0001)] == [
        "0.000",
        "0.500",
        "-12.346",
        "123.4",
        "1.2e+04",
        "-1e-04",
        "1.0e-04",
    ]
    assert format_loss(math.nan) == "-"
    assert [format_speed(x) for x in (0.51, 9.97, 1234.5)] == ["0.5 images/s", "10 images/s", "1234 images/s"]


def test_a_long_epoch_without_a_terminal_prints_a_line_a_minute(monkeypatch):
    output, now = io.StringIO(), [0.0]
    monkeypatch.setattr("localprop.report.progress.time.monotonic", lambda: now[0])
    with Progress(Console(file=output, width=200), 2, 100, 32, 2) as progress:
        for step in range(1, 101):
            now[0] += 2.5
            progress.step(1, step, [1.0, 2.0], 2**30)
    lines = output.getvalue().splitlines()
    assert [line.split()[2] for line in lines] == ["24/100", "48/100", "72/100", "96/100"]
    assert all("1.000   2.000" in line and "left" in line for line in lines)
