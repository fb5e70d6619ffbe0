"""What --trace records of a real run, against that run; and what is made of it, against times that are known."""

import json
from itertools import pairwise

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.image import imread

from localprop.cli import main
from localprop.parallel.timeline.picture import draw_timeline
from localprop.parallel.timeline.recording import RECORDED, Lane, Recorder, Span, Timeline
from localprop.report.results import read_results
from ranks import assert_same_run, flags

IMAGES = 256


@pytest.fixture(scope="module")
def traced(forker, tmp_path_factory):
    """The output folder of a run with three modules in two processes, and its trace."""
    output = tmp_path_factory.mktemp("traced")
    ranks = forker.train(output, 2, *flags(output, 3, "--epochs", "2", "--reach", "0", "--trace"))
    assert ranks.wait() == [0, 0], ranks.log.read_text()
    return output, json.loads((output / "run" / "trace.json").read_text())


def spans_of(trace, *kinds, rank=None):
    events = [e for e in trace["traceEvents"] if e["ph"] == "X" and (rank is None or e["tid"] == rank)]
    return sorted((e for e in events if e["cat"] in kinds), key=lambda e: e["ts"])


@pytest.mark.processes
def test_a_traced_run_is_the_same_run(traced, alone):
    assert_same_run(traced[0], alone(3, "--epochs", "2", "--reach", "0"))


@pytest.mark.processes
def test_every_step_of_every_module_is_there_once_and_in_order(traced):
    output, trace = traced
    count = read_results(output / "run" / "results.csv")[-1].step
    begins, ranks = {}, []
    for module in range(3):
        own = [e for e in spans_of(trace, "compute") if e["args"]["module"] == module]
        (rank,) = {e["tid"] for e in own}
        ranks.append(rank)
        assert [e["args"]["step"] for e in own] == list(range(count))
        begins[module] = [(e["ts"], e["ts"] + e["dur"]) for e in own]
    assert len(spans_of(trace, "compute")) == 3 * count
    for module in (1, 2):
        for (_, end), (begin, _) in zip(begins[module - 1], begins[module], strict=True):
            assert begin >= end
    assert ranks in ([0, 0, 1], [0, 1, 1])  # shared out by simulated time
    sent = spans_of(trace, "send", rank=0)
    assert [e["args"]["step"] for e in sent] == list(range(count))
    for event, (begin, _) in zip(sent, begins[ranks.index(1)], strict=True):
        assert event["ts"] < begin


@pytest.mark.processes
def test_spans_do_not_overlap_and_take_the_time_that_the_run_took(traced):
    output, trace = traced
    rows = read_results(output / "run" / "results.csv")
    for rank in (0, 1):
        spans = spans_of(trace, "compute", "wait", "room", "send", "load", "evaluate", "save", rank=rank)
        assert all(a["ts"] + a["dur"] <= b["ts"] + 0.01 for a, b in pairwise(spans))
    for first, row in zip([0, rows[0].step], rows, strict=True):
        steps = range(first, row.step)
        own = [e for e in spans_of(trace, "wait", "compute", rank=1) if e["args"]["step"] in steps]
        took = (own[-1]["ts"] + own[-1]["dur"] - own[0]["ts"]) / 1e6
        assert took == pytest.approx(len(steps) * IMAGES / row.examples_per_second, rel=0.2, abs=0.1)
        # A busy machine takes its share between the spans.
        assert 0.1 * took < sum(e["dur"] for e in own) / 1e6 <= took
    known = trace["otherData"]
    for shares, waiting in zip(known["shares"], known["waiting"], strict=True):
        assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
        assert waiting == pytest.approx(shares["wait"] + shares["room"], abs=1e-4)


@pytest.mark.processes
def test_the_picture_of_a_run_is_drawn(traced):
    assert imread(traced[0] / "run" / "timeline.png").shape[1] == 1400


def known_timeline():
    """Two processes: 20 ms of computing each step, of which the first averages for 5; the second waits for 10."""
    first, second = [], []
    for step in range(40):
        t = 0.03 * step
        first += [
            Span("compute", step, 0, t, t + 0.02),
            Span("replicas", step, None, t + 0.01, t + 0.015),
            Span("send", step, None, t + 0.02, t + 0.021),
            Span("room", step, None, t + 0.021, t + 0.03),
        ]
        second += [Span("wait", step, None, t + 0.03, t + 0.04), Span("compute", step, 1, t + 0.04, t + 0.06)]
    second.append(Span("save", 4, None, 0.17, 0.175))
    return Timeline([Lane("module 1", first), Lane("module 2", second)], 2, [0.0, 0.0])


def test_shares_of_known_times():
    timeline = known_timeline()
    steps = timeline.steady()
    assert steps == range(15, 40)  # behind the checkpoint, when the pipeline is full again
    first, second = timeline.shares(steps)
    shares = {"compute": 1 / 2, "replicas": 1 / 6, "send": 1 / 30, "room": 0.3}
    shares |= dict.fromkeys(("wait", "gradient", "back", "load", "other"), 0)
    assert first == pytest.approx(shares, abs=1e-9)
    assert timeline.waiting(steps) == pytest.approx([0.3, 1 / 3])
    assert second["compute"] == pytest.approx(2 / 3)


def test_the_picture_shows_what_is_known(tmp_path):
    timeline = known_timeline()
    draw_timeline(tmp_path / "timeline.png", timeline, "known")
    pixels = torch.from_numpy(imread(tmp_path / "timeline.png"))[..., :3]
    height, width = pixels.shape[:2]
    lane = 0.55 * 140
    for rank, part in ((0, 1 / 2 + 1 / 6), (1, 2 / 3)):
        # Below the numbers, above the next lane.
        row = pixels[int(height - 0.5 * 140 - lane * (2 - rank) + 0.75 * lane), int(0.15 * width) : int(0.91 * width)]
        grey = (row - 0.87).abs().max(dim=1).values < 0.01
        white = row.min(dim=1).values > 0.99
        assert 1 - (grey | white).float().mean() == pytest.approx(part, abs=0.08)


def test_lines_lead_from_each_micro_batch_that_is_sent_to_where_it_is_used(tmp_path, monkeypatch):
    # Each step in two parts of 1 s; the second process is one part behind, and trains two modules.
    def computing(moment, step, module, seconds):
        return Span("compute", step, module, moment, moment + seconds)

    first, second = [], []
    for number in range(2 * 40):
        first += [computing(number, number // 2, 0, 0.9), Span("send", number // 2, None, number + 0.9, number + 1)]
        second += [computing(number + 1, number // 2, 1, 0.5), computing(number + 1.5, number // 2, 2, 0.5)]
    lines, numbers = [], []
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **_: lines.append(x))
    monkeypatch.setattr(Axes, "text", lambda self, x, y, text, **_: numbers.append((y, text)))
    draw_timeline(
        tmp_path / "timeline.png", Timeline((Lane("first", first), Lane("second", second)), 3, (0.0, 0.0)), "two parts"
    )
    assert len(lines) >= 15
    assert all(used == pytest.approx(sent) for sent, used in lines)
    steps = [text for rank, text in numbers if rank == 0]
    assert steps == [str(step) for step in range(int(steps[0]), int(steps[0]) + len(steps))]  # once for both parts


def test_only_the_last_steps_are_kept():
    recorder = Recorder()
    for step in range(3 * RECORDED):
        recorder.begin(step)
        with recorder.span("compute", 0):
            pass
    assert [span.step for span in recorder.spans] == list(range(2 * RECORDED, 3 * RECORDED))


ALIGN = """
import time
from localprop.parallel.job import join
from localprop.parallel.timeline.traces import align
job = join("cpu")
clock = lambda: time.perf_counter() + (0, 1000)[job.rank]
offset, error = align(job, clock, f"machine {job.rank}")
assert abs(offset + (0, 1000)[job.rank]) <= error + 1e-6 < 0.1, (offset, error)
assert align(job) == (0.0, 0.0)  # one machine has one clock
job.leave()
"""


@pytest.mark.processes
def test_clocks_of_two_machines_are_brought_together(forker, tmp_path):
    ranks = forker.start(tmp_path / "log", 2, code=ALIGN)
    assert ranks.wait() == [0, 0], ranks.log.read_text()


def test_a_trace_needs_processes(capsys):
    assert main(["train", "--trace"]) == 2
    assert capsys.readouterr().err.startswith("localprop: --trace shows what several processes do; add --parallel")
