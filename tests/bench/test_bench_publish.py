"""Published figures beside ours, and the page of results that is made of records."""

import importlib.util
import re

import pytest
import yaml

from bench_records import cells, make_record, suite, write_folder
from localprop.bench.reports.publish import END, START, publish
from localprop.bench.reports.published import memory_comparison, orderings, paper_comparison
from localprop.errors import BenchError
from places import ROOT

PUBLISHED = {
    "cifar10": {"end-to-end": 91.37, "feature-reconstruction": 86.28, "greedy": 83.94, "infopro": None},
    "svhn": {"end-to-end": 95.0, "greedy": 90.5},
}


def test_published_figures_beside_ours():
    head, *rows = cells(paper_comparison(suite(), PUBLISHED))
    assert head == ["data", "method", "published (%)", "gap", "here (%)", "gap", "seeds"]
    assert rows == [
        ["cifar10", "end-to-end", "91.37", "0", "82.00 ± 1.00", "0", "3"],
        # Of two decoders that of the defaults, at K=4: 79 - 4 / 2 + (1, 2, 3).
        ["cifar10", "feature-reconstruction", "86.28", "-5.09", "79.00 ± 1.00", "-3.00 ± 0.00", "3"],
        ["cifar10", "greedy", "83.94", "-7.43", "79.00 ± 1.50", "-3.00 ± 0.50", "3"],
        ["cifar10", "infopro", "-", "-", "77.00 ± 1.00", "-5.00 ± 0.00", "3"],
        ["svhn", "end-to-end", "95.00", "0", "not run", "-", "-"],
        ["svhn", "greedy", "90.50", "-4.50", "not run", "-", "-"],
    ]


def test_an_ordering_counts_if_all_seeds_and_enough_images_show_it():
    # Near 79% the standard error of a difference over 10000 images is 0.58 points.
    def verdict(gaps):
        records = [make_record("greedy", 4, seed=s, accuracy=79.0) for s in range(len(gaps))]
        records += [make_record("infopro", 4, seed=s, accuracy=79.0 - gap) for s, gap in enumerate(gaps)]
        ((*_, seeds, word),) = orderings(records, {"cifar10": {"infopro": 60.0, "greedy": 61.0}})
        assert seeds == str(len(gaps))
        return word

    assert verdict([1.3, 1.3]) == "reproduced"
    assert verdict([-1.3, -1.3]) == "opposite"
    assert verdict([1.0, 1.0]) == "open"
    assert verdict([9.0, -0.1]) == "open"
    assert orderings(suite(), {"svhn": PUBLISHED["svhn"]}) == []


def test_published_memory_beside_ours():
    text = memory_comparison(suite(), {2: {"feature-reconstruction": 0.64}, 8: {"infopro": 0.3}})
    assert cells(text)[1:] == [["feature-reconstruction", "2", "0.64", "0.60"], ["infopro", "8", "0.30", "not run"]]


def test_results_are_published_between_the_markers_alone(tmp_path):
    folder = write_folder(tmp_path / "benchmarks" / "small", suite())
    readme, page = tmp_path / "README.md", tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    readme.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    written = publish(folder, ROOT / "benchmarks" / "published.yaml", page, readme)
    assert written == [page, page.with_name("results-pareto.png"), page.with_name("results-depth.png"), readme]
    assert all(path.stat().st_size for path in written)
    text = readme.read_text()
    assert text.startswith(f"before\n{START}\n")
    assert text.endswith(f"\n{END}\nafter\n")
    assert "old" not in text
    assert "](docs/results-pareto.png)" in text
    assert "](docs/results.md)" in text
    assert len(cells(text)) == 1 + 5
    assert paper_comparison(suite(), yaml.safe_load((ROOT / "benchmarks/published.yaml").read_text())["accuracy"]) in (
        page.read_text()
    )
    assert "](../benchmarks/small)" in page.read_text()
    publish(folder, ROOT / "benchmarks" / "published.yaml", page, readme)
    assert readme.read_text() == text
    readme.write_text("no markers\n")
    with pytest.raises(BenchError, match="no place for results"):
        publish(folder, ROOT / "benchmarks" / "published.yaml", page, readme)


def test_the_script_says_that_there_are_no_results_yet(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location("publish_script", ROOT / "benchmarks" / "publish.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    before = (ROOT / "README.md").read_bytes()
    assert script.main() == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert (ROOT / "README.md").read_bytes() == before
    assert before.count(START.encode()) == before.count(END.encode()) == 1


def test_the_published_page_is_what_the_committed_records_give(tmp_path):
    root = ROOT
    folder, figures = root / "benchmarks" / "results" / "cifar10-small", root / "benchmarks" / "published.yaml"
    readme = tmp_path / "README.md"
    readme.write_text((root / "README.md").read_text())
    (tmp_path / "docs").mkdir()
    publish(folder, figures, tmp_path / "docs" / "results.md", readme, "JPEG copy")
    assert readme.read_text() == (root / "README.md").read_text()
    made, kept = (place / "docs" / "results.md" for place in (tmp_path, root))
    # The folder of the records lies elsewhere, seen from there.
    assert re.sub(r"\(\S*results/cifar10-small\)", "", made.read_text()) == re.sub(
        r"\(\S*results/cifar10-small\)", "", kept.read_text()
    )
