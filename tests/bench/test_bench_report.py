"""What is seen of a finished suite: settings and tasks, tables against end-to-end, pictures."""

import json
import statistics

import matplotlib.image
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from bench_records import cells, column, make_record, suite, write_folder
from localprop.bench.reports import gap, pictures
from localprop.bench.reports.groups import comparisons_of, pareto_front
from localprop.bench.reports.measured import how_measured
from localprop.bench.reports.placing import label_ends, label_points
from localprop.bench.reports.report import write_report
from localprop.bench.reports.tables import comparison_table, module_table
from localprop.errors import BenchError


def series(comparison, label):
    return next(s for s in comparison.series if s.label == label)


# Settings and tasks


def test_runs_that_differ_in_their_seed_alone_are_one_setting():
    (comparison,) = comparisons_of(suite())
    assert [s.label for s in comparison.series] == [
        "end-to-end",
        *("feature-reconstruction, K=2, conv decoder", "greedy, K=2", "infopro, K=2"),
        *("feature-reconstruction, K=4, conv decoder", "feature-reconstruction, K=4, deconv decoder"),
        *("greedy, K=4", "infopro, K=4"),
    ]
    assert all(sorted(s.records) == [1, 2, 3] for s in comparison.series)
    assert comparison.baseline is comparison.series[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [("data", "svhn"), ("model", "vit_tiny"), ("model_kwargs", {"depth": 4}), ("img_size", 64), ("amp", True),
     ("amp_dtype", "float16"), ("epochs", 7), ("batch_size", 7)],
)  # fmt: skip
def test_what_cannot_be_compared_is_another_task(key, value):
    comparisons = comparisons_of([make_record(), make_record(accuracy=70.0, **{key: value})])
    assert len(comparisons) == 2
    assert comparisons[0].name != comparisons[1].name
    assert [comparison.gap(comparison.series[0]).mean for comparison in comparisons] == [0, 0]


def test_what_is_compared_may_differ_in_all_else():
    records = [make_record(), make_record("greedy", 4, lr=1e-4), make_record("greedy", 4, lr=1e-3, head="linear")]
    (comparison,) = comparisons_of(records)
    # 3e-3 is the default, and end-to-end has no head.
    assert [s.label for s in comparison.series] == ["end-to-end", "greedy, lr 0.0001", "greedy, linear head, lr 0.001"]


def test_a_part_that_is_off_has_no_name():
    parts = [make_record("greedy", 4, reach=r, kinetic=k) for r, k in ((0, 0.0), (1, 0.0), (0, 0.1), (1, 0.1))]
    (comparison,) = comparisons_of([make_record(reach=0), make_record(seed=2, reach=1), *parts])
    names = ["greedy", "greedy, kinetic 0.1", "greedy, reach 1", "greedy, reach 1, kinetic 0.1"]
    assert comparison.series[0].label == "end-to-end"
    assert len(comparison.series[0].records) == 2
    assert sorted(sorted(s.label.split(", ")) for s in comparison.series[1:]) == sorted(
        sorted(name.split(", ")) for name in names
    )


def test_accuracies_on_validation_and_test_images_are_apart():
    other = make_record()
    other.result["evaluated_on"] = "validation"
    assert len({comparison.name for comparison in comparisons_of([make_record(), other])}) == 2


def test_a_size_that_is_the_datasets_own_is_that_size():
    (comparison,) = comparisons_of([make_record(img_size=None), make_record("greedy", 4, img_size=32)])
    assert [s.label for s in comparison.series] == ["end-to-end", "greedy"]


def test_names_of_places_and_what_end_to_end_does_not_use_make_no_setting():
    records = [make_record(workers=1), make_record(seed=2, workers=4, decoder="deconv", head="linear")]
    (comparison,) = comparisons_of(records)
    assert [len(s.records) for s in comparison.series] == [2]


def test_checkpointing_and_recomputing_are_no_baseline():
    records = [make_record(grad_checkpointing=True, peak=370), make_record(recompute=True, peak=700)]
    (comparison,) = comparisons_of(records)
    assert comparison.baseline is None
    (comparison,) = comparisons_of([*records, make_record(peak=1000)])
    assert [s.label for s in comparison.series] == ["end-to-end", "end-to-end, checkpointing", "end-to-end, recompute"]
    assert column(comparison_table(comparison), "memory ratio")["end-to-end, checkpointing"] == "0.37"


def test_of_several_end_to_end_settings_the_most_accurate_is_the_baseline():
    records = [make_record(lr=lr, accuracy=a) for lr, a in ((1e-2, 60.0), (1e-3, 81.0), (1e-4, 70.0))]
    (comparison,) = comparisons_of([*records, make_record("greedy", 4, accuracy=75.0, lr=1e-2)])
    assert comparison.baseline.config["lr"] == 1e-3
    assert column(comparison_table(comparison), "gap (points)")["greedy, lr 0.01"] == "-6.00"


# Tables


def test_mean_and_deviation_over_seeds():
    records = suite()
    (comparison,) = comparisons_of(records)
    own = [r.result["accuracy"] for r in records if (r.config["method"], r.config["modules"]) == ("greedy", 4)]
    spread = series(comparison, "greedy, K=4").score
    assert spread.count == 3
    assert spread.mean == pytest.approx(statistics.mean(own))
    assert spread.std == pytest.approx(statistics.stdev(own))
    accuracies = column(comparison_table(comparison), "accuracy (%)")
    assert accuracies["greedy, K=4"] == f"{statistics.mean(own):.2f} ± {statistics.stdev(own):.2f}"
    # 79 - 1 + 2, the best of the local ones; that of end-to-end is higher.
    assert [label for label, cell in accuracies.items() if "**" in cell] == [
        "feature-reconstruction, K=2, conv decoder"
    ]


def test_one_seed_has_no_deviation():
    (comparison,) = comparisons_of(suite(seeds=(1,)))
    assert "±" not in comparison_table(comparison)


def test_gaps_are_paired_by_seed():
    records = suite()
    by_seed = {r.config["seed"]: r.result["accuracy"] for r in records if r.config["method"] == "end-to-end"}
    own = [r for r in records if (r.config["method"], r.config["modules"]) == ("greedy", 2)]
    gaps = [r.result["accuracy"] - by_seed[r.config["seed"]] for r in own]
    (comparison,) = comparisons_of(records)
    text = column(comparison_table(comparison), "gap (points)")
    assert text["greedy, K=2"] == f"{statistics.mean(gaps):+.2f} ± {statistics.stdev(gaps):.2f}"
    # The seed shifts both alike, which is no spread of their difference.
    assert text["infopro, K=2"] == "-5.00 ± 0.00"
    assert text["end-to-end"] == "0"


def test_gaps_take_the_seeds_that_both_have():
    records = [make_record(seed=s, accuracy=80.0 + 10 * s) for s in (1, 2)]
    records += [make_record("greedy", 4, seed=s, accuracy=70.0 + 11 * s) for s in (2, 3)]
    (comparison,) = comparisons_of(records)
    assert column(comparison_table(comparison), "gap (points)")["greedy"] == f"{92 - 100:+.2f} (1 of 2 seeds)"
    (comparison,) = comparisons_of(
        [make_record(seed=1, accuracy=80.0), make_record("greedy", 4, seed=2, accuracy=77.0)]
    )
    assert column(comparison_table(comparison), "gap (points)")["greedy"] == "-3.00 (unpaired)"


def test_memory_is_measured_where_it_was_and_compared_with_its_own_kind():
    records = [
        make_record(peak=1000, predicted=900),
        make_record("greedy", 2, peak=500, predicted=1),
        make_record("greedy", 4, peak=None, predicted=300),
        make_record("greedy", 8, peak=None, predicted=None, step=0.15),
    ]
    (comparison,) = comparisons_of(records)
    text = comparison_table(comparison)
    assert list(column(text, "peak memory (MiB)").values()) == ["1000", "500", "300 (predicted)", "-"]
    assert list(column(text, "memory ratio").values()) == ["1.00", "0.50", f"{300 / 900:.2f}", "-"]
    assert list(column(text, "time ratio").values()) == ["1.00", "1.00", "1.00", "1.50"]


def test_without_a_baseline_there_is_nothing_to_compare_with():
    (comparison,) = comparisons_of([make_record("greedy", 2), make_record("greedy", 4)])
    for name in ("gap (points)", "memory ratio", "time ratio"):
        assert set(column(comparison_table(comparison), name).values()) == {"-"}


def test_runs_without_an_accuracy_have_a_dash_and_make_no_mean():
    records = [make_record(seed=1, accuracy=float("nan")), make_record(seed=2, accuracy=81.0)]
    (comparison,) = comparisons_of([*records, make_record("greedy", 4, accuracy=None)])
    assert column(comparison_table(comparison), "accuracy (%)") == {"end-to-end": "81.00", "greedy": "-"}


def test_accuracy_by_module_has_the_network_last():
    records = suite()
    (comparison,) = comparisons_of(records)
    head, *rows = cells(module_table(comparison))
    rows = {row[0]: row[1:] for row in rows}
    assert head == ["setting", "1", "2", "3", "network"]
    assert rows["end-to-end"] == ["", "", "", "82.00"]
    assert rows["infopro, K=4"] == ["-", "-", "-", "77.00"]
    own = [
        r.result["module_accuracies"]
        for r in records
        if r.config["method"] == "greedy" and len(r.network["modules"]) == 2
    ]
    inside, network = (f"{statistics.mean(values):.2f}" for values in zip(*own, strict=True))
    assert rows["greedy, K=2"] == [inside, "", "", network]


# Pictures


def test_the_pareto_front_of_hand_made_points():
    points = [(1.0, 80), (0.5, 70), (0.5, 75), (0.4, 60), (0.7, 75), (0.6, 74), (0.4, 60), (1.2, 80)]
    front = pareto_front(points)
    assert front == [3, 2, 0]
    for i, (memory, accuracy) in enumerate(points):
        beaten = any((m < memory and a >= accuracy) or (m <= memory and a > accuracy) for m, a in points)
        assert beaten == (i not in front) or points[i] == points[3]


def panel(points):
    figure = Figure(figsize=(10, 5), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.08, 0.1, 0.6, 0.8))
    axes.set_xlim(0.2, 1.1)
    axes.set_ylim(min(y for _, y in points) - 2, max(y for _, y in points) + 2)
    return axes


def overlaps(axes):
    axes.figure.canvas.draw()  # before, an annotation does not know where it is
    boxes = [Text.get_window_extent(note) for note in axes.texts]  # an annotation's own has its line in it
    return sum(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_labels_of_points_that_lie_close_do_not_overlap():
    numbers = np.random.default_rng(0)
    points = np.column_stack([0.4 + 0.01 * numbers.random(15), 78 + numbers.random(15)])
    axes = panel(points)
    label_points(axes, points, np.full(15, 0.2), points[:2], [f"K=4, decoder {i}" for i in range(15)], ["b"] * 15)
    assert len(axes.texts) == 15
    assert overlaps(axes) == 0
    assert all(axes.bbox.contains(*Text.get_window_extent(note).get_points()[0]) for note in axes.texts)


def test_labels_beside_a_panel_do_not_overlap_and_keep_the_order():
    ends = [(1.0, 70 + 0.001 * i) for i in range(12)]
    axes = panel(ends)
    label_ends(axes, ends, [str(i) for i in range(12)], ["b"] * 12)
    assert overlaps(axes) == 0
    assert sorted(axes.texts, key=lambda note: note.xyann[1]) == list(axes.texts)


@pytest.mark.parametrize(
    ("records", "drawn"),
    [
        (suite(), {"pareto", "depth", "curves", "gap"}),
        ([make_record("greedy", 4)], {"pareto", "depth", "curves"}),
        ([make_record()], {"pareto", "curves"}),
        ([r for data in ("cifar10", "cifar100", "stl10", "svhn", "digits") for r in suite(data, (1,))],
         {"pareto", "depth", "curves", "gap"}),
        ([make_record("greedy", k, accuracy=None, epochs=e) for k in (2, 24) for e in (1, 2)], {"pareto", "curves"}),
        ([make_record("greedy", 4, peak=None, predicted=None)], {"depth", "curves"}),
    ],
    ids=["seeds", "one run", "end-to-end alone", "five tasks", "memory alone", "no memory"],
)  # fmt: skip
def test_a_report_of_any_suite(tmp_path, records, drawn):
    folder = write_folder(tmp_path / "small", records)
    (folder / "depth.png").write_bytes(b"of an earlier report")
    written = write_report(folder)
    assert written == [
        folder / "report.md",
        *(folder / f"{n}.png" for n in ("pareto", "depth", "curves", "gap") if n in drawn),
    ]
    assert {path.stem for path in folder.glob("*.png")} == drawn
    text = written[0].read_text()
    assert all((f"]({name}.png)" in text) == (name in drawn) for name in ("pareto", "depth", "curves", "gap"))
    for path in written[1:]:
        pixels = matplotlib.image.imread(path)
        assert pixels.shape[1] == 1400
        assert pixels[..., :3].min() < 0.5
    assert ("The pictures show the first 4 of 5 comparisons" in text) == (len(comparisons_of(records)) == 5)
    assert ("The pictures show" in text) == (len(comparisons_of(records)) > 4)
    assert text.count("| setting | K |") == len(comparisons_of(records))


def test_a_picture_has_a_panel_for_each_of_four_tasks_and_a_point_and_a_name_for_each_setting(tmp_path, monkeypatch):
    figures = []
    for module in (pictures, gap):
        monkeypatch.setattr(module, "save", lambda figure, path: figures.append(figure))
    comparisons = comparisons_of([r for epochs in range(1, 6) for r in suite(epochs=epochs)])
    assert all(draw(tmp_path / "picture.png", comparisons, "") for draw in pictures.PICTURES.values())
    assert [len(figure.axes) for figure in figures] == [4, 4, 4, 4]
    for figure in figures[:3]:
        for axes, comparison in zip(figure.axes, comparisons, strict=False):
            assert axes.get_title(loc="left") == comparison.name
            known = [s for s in comparison.series if figure is not figures[1] or s.method != "infopro"]
            assert sorted(note.get_text() for note in axes.texts) == sorted(s.short for s in known)
    points = {tuple(np.ravel(bars.lines[0].get_data())) for bars in figures[0].axes[0].containers}
    assert points == {(comparisons[0].memory_ratio(s), s.score.mean) for s in comparisons[0].series}


def test_the_picture_of_gaps_has_memory_and_time_and_a_point_for_each_setting(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(gap, "save", lambda figure, path: figures.append(figure))
    (comparison,) = comparisons_of([*suite(), make_record("greedy", 8, peak=None, predicted=None, step=0.15)])
    assert gap.draw_gap(tmp_path / "gap.png", [comparison], "")
    memory, time = figures[0].axes
    for axes, across, known in (
        (memory, comparison.memory_ratio, [s for s in comparison.series if s.modules != 8]),
        (time, comparison.time_ratio, comparison.series),
    ):
        points = {tuple(np.ravel(bars.lines[0].get_data())) for bars in axes.containers}
        assert points == {(across(s), comparison.gap(s).mean) for s in known}
        assert sorted(note.get_text() for note in axes.texts) == sorted(s.short for s in known)
        assert axes.get_title(loc="left") == comparison.name


def test_the_report_says_how_it_was_measured():
    text = "\n".join(how_measured(suite(epochs=40)))
    # The defaults (batch size, lr) and what differs (method, seed) are left out.
    assert "`localprop train --data cifar10 --epochs 40`" in text
    assert "cifar10: 50000 training images, evaluated on 10000 test images; 32 px, 10 classes" in text
    assert "24 runs, 24:00 in all; at once: 2" in text
    assert "commit: 0123456789; 0123456789 with changes that are not committed" in text
    assert "torch 2.8.0" in text
    assert "machine: cpu a CPU\n" in text + "\n"
    assert "last epoch" in text


def test_a_file_that_is_no_record_is_an_error_of_one_line(tmp_path):
    folder = write_folder(tmp_path / "small", [make_record()])
    (folder / "other.json").write_text(json.dumps({"accuracy": 1}))
    with pytest.raises(BenchError, match=r"other\.json is no result of a run") as error:
        write_report(folder)
    assert "\n" not in str(error.value)
    assert not (folder / "report.md").exists()


def test_end_to_end_training_in_several_modules_is_compared_with_that_in_one(tmp_path):
    exact = [
        make_record("end-to-end", 4, seed=seed, peak=500, decoder=name) for seed, name in ((1, "conv"), (2, "mlp"))
    ]
    plain = [make_record(seed=seed) for seed in (1, 2)]
    (comparison,) = comparisons_of([*exact, *plain, make_record("greedy", 4, peak=400)])
    assert [s.label for s in comparison.series] == ["end-to-end", "exact K=4", "greedy"]
    assert [s.short for s in comparison.series] == ["end-to-end", "exact K=4", "K=4"]
    assert comparison.baseline is comparison.series[0]
    # It has no decoder, so that both seeds are one series; where it is cut makes another.
    assert [len(s.records) for s in comparison.series] == [2, 2, 1]
    assert comparison.memory_ratio(comparison.series[1]) == 0.5
    (comparison,) = comparisons_of([*exact, make_record("end-to-end", 4, cuts=["blocks.1"])])
    assert comparison.baseline is None
    assert [s.label for s in comparison.series] == ["exact K=4", "exact K=4, cuts blocks.1"]
    assert write_report(write_folder(tmp_path, [*exact, *plain]))
    (comparison,) = comparisons_of([*exact, *plain, make_record("greedy", 4, accuracy=70.0)])
    _, *rows = cells(module_table(comparison))
    assert rows[1] == ["exact K=4", "", "", "", "80.00"]
    assert rows[2][1:] == ["60.00", "60.00", "60.00", "70.00"]
