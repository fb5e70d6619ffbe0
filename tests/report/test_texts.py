"""Names that come from records, suites and models do no harm where they are shown."""

import re
import warnings

import pytest
from PIL import Image

from bench_records import make_record, suite, write_folder
from localprop.bench.live import SuiteView
from localprop.bench.reports.report import write_report
from localprop.bench.reports.tables import comparison_table
from localprop.cli import main
from localprop.errors import shortened
from localprop.report.progress import Progress
from localprop.report.texts import code, drawn, markdown

EVIL = [
    "$\\frac{1$",
    "$a$ and $b",
    "<img src=x onerror=alert(1)>",
    "a | b | c",
    "[click](https://evil.example)",
    "![x](y)",
    "`rm -rf`",
    "*bold* _slanted_ ~~gone~~",
    "two\nlines\n\n# heading",
    "\x1b[31mred\x1b[0m\x07",
    "\u202eleft",
    "\ud800",
    "x" * 1_000_000,
    "&lt;b&gt;",
    "# heading",
]


@pytest.mark.parametrize("text", EVIL)
def test_markdown_shows_a_text_as_it_is(text):
    shown = markdown(text)
    assert "\n" not in shown
    assert len(shown) < 600
    assert shown.isprintable()
    assert not re.search(r"<|(?<!\\)\]\(|://|(?<!\\)!\[|\x1b", shown)
    for character in "|`$*~":
        assert not re.search(rf"(?<!\\)(\\\\)*\{character}", shown)
    assert not shown.startswith("#")
    shown.encode()


def test_ordinary_names_stay_as_they_are():
    for text in ("swin_tiny_patch4_window7_224, K=4, lr 0.01", "depths [2, 2]", "feature-reconstruction", "no compile"):
        assert markdown(text) == code(text)[1:-1] == drawn(text) == shortened(text) == text


def test_code_holds_any_backticks():
    for text in ("`", "``a``", "a `b`` c", "plain"):
        span = code(text)
        fence = re.match("`+", span)[0]
        inside = span[len(fence) : -len(fence)]
        assert fence not in inside
        assert inside.strip(" ") == text
        assert inside[0] != "`" != inside[-1]


def poisoned(text):
    """Records in which all words are `text`."""
    records = [make_record(seed=1, decoder=text), make_record(text, 2, seed=1, lr=0.5)]
    records += [make_record("greedy", 2, seed=1, head=text, model=text)]
    for i, record in enumerate(records):
        record.data.update(name=text, source=text)
        record.result["evaluated_on"] = text
        record.provenance.update(commit=text, versions={text: text}, cpu=text, gpu=text)
        object.__setattr__(record, "suite", text)
        object.__setattr__(record, "run", f"run-{i}")
    return records


@pytest.mark.parametrize(
    ("text", "published"),
    [(EVIL[0], False), (EVIL[0], True), (" ".join(EVIL[1:11]), True), *((text, False) for text in EVIL[11:13])],
    ids=range(5),
)
def test_a_report_of_such_records_has_its_form(tmp_path, text, published):
    folder = write_folder(tmp_path, poisoned(text))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        paths = write_report(folder, published=published)
    report = re.sub("<!-- /?results -->", "", paths[0].read_text())
    assert len(report) < 60_000
    assert "\x1b" not in report
    outside = re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", report)  # without code
    assert "<" not in outside
    assert "evil.example" not in outside or "https&#58;//evil" in outside
    plain = [line for line in report.splitlines() if line.startswith("#")]
    assert plain[0].startswith("# ")
    assert all(re.match(r"##? ", line) for line in plain)
    for table in re.findall(r"(?:^\|.*\n)+", report, re.MULTILINE):
        columns = {len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in table.splitlines()}
        assert len(columns) == 1
    for path in paths[1:]:
        assert Image.open(path).size[0] == 1400


def test_labels_that_are_cut_still_stand_for_their_settings():
    records = suite(seeds=(1,), model_kwargs={"name": "y" * 10_000})
    assert len(records) == 8
    from localprop.bench.reports.groups import comparisons_of

    (comparison,) = comparisons_of(records)
    assert len(comparison_table(comparison).splitlines()) == 2 + len(comparison.series)
    assert all(len(series.label) <= 120 and len(series.short) <= 60 for series in comparison.series)


def test_a_terminal_gets_no_commands(capsys, monkeypatch, tmp_path):
    assert main(["eval", str(tmp_path / "run\x1b[31m\n[red]x[/red]")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "\x1b" not in error
    assert "[red]x[/red]" in error

    from rich.console import Console

    console = Console(force_terminal=False, width=200)
    with Progress(console, 1, 1, 1, 1, []) as progress:
        progress.note("skipped \x1b[2J[bold]a[/bold]\nb.png")
    out = capsys.readouterr().out
    assert "skipped \\x1b[2J[bold]a[/bold]\\nb.png" in out

    view = SuiteView(console, "su\x1bite[red]")
    assert view._heading().startswith("su\\x1bite[red]: 0 of 0")


def test_names_of_units_are_no_markup(monkeypatch, capsys):
    import torch

    from localprop.registry import MODELS

    model = torch.nn.Sequential()
    model.add_module("[red]a[", torch.nn.Conv2d(3, 4, 3))
    model.add_module(
        "rest",
        torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 2)),
    )
    monkeypatch.setitem(MODELS, "made-up", lambda **_: model)
    assert main(["chain", "made-up", "--img-size", "16"]) == 0
    assert "[red]a[" in capsys.readouterr().out
