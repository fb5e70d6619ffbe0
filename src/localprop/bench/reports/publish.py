"""Writes a page of results beside the published ones, and the part of a README that shows them.

Every sentence about numbers is computed from the numbers.
"""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from localprop.bench.record import Record, read_records
from localprop.bench.reports.groups import comparisons_of
from localprop.bench.reports.pictures import draw_depth, draw_pareto
from localprop.bench.reports.published import OPEN, OPPOSITE, REPRODUCED, memory_comparison, orderings, paper_comparison
from localprop.bench.reports.report import comparison_sections, how_measured, title_of
from localprop.bench.reports.tables import results_table, table
from localprop.errors import BenchError
from localprop.report.texts import markdown
from localprop.settings.values import read_yaml
from localprop.system.files import write_text

START, END = "<!-- results -->", "<!-- /results -->"
README_ROWS = 5


def publish(folder: Path, published: Path, page: Path, readme: Path, images: str = "") -> list[Path]:
    """Writes a page of results with two pictures beside it, and the part of a README between its markers.

    Args:
        folder: records of a suite.
        published: YAML with "model", "modules", "accuracy" (dataset, method, percent), "memory" (K, method, ratio),
            "sources" and "unknown" (lists of sentences).
        page: the Markdown file; the pictures are called PAGE-pareto.png and PAGE-depth.png.
        readme: a Markdown file with the lines `<!-- results -->` and `<!-- /results -->`.
        images: what the records do not say about the images, such as "JPEG copy".

    Returns:
        The paths written.

    Raises:
        BenchError: there are no records, a file is not a record, or the README has no markers.
        ConfigError: the published figures cannot be read.
        CheckpointError: the disk is full, may not be written or fails.
    """
    records, figures, text = read_records(folder), read_yaml(published), readme.read_text(encoding="utf-8")
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise BenchError(f"{readme} has no place for results; add the lines {START} and {END}")
    comparisons, title = comparisons_of(records), title_of(records)
    pictures = [page.with_name(f"{page.stem}-{name}.png") for name in ("pareto", "depth")]
    draws = (draw_pareto, draw_depth)
    pictures = [path for path, draw in zip(pictures, draws, strict=True) if draw(path, comparisons, title)]
    source = os.path.relpath(folder, page.parent)
    write_text(page, "\n".join(_page(records, figures, [path.name for path in pictures], source, images)) + "\n")
    shown = [os.path.relpath(path, readme.parent) for path in pictures[:1]]
    block = _readme_part(records, shown, os.path.relpath(page, readme.parent), images)
    write_text(readme, f"{before}{START}\n{block}\n{END}{after}")
    return [page, *pictures, readme]


def _page(
    records: Sequence[Record], figures: dict[str, Any], pictures: Sequence[str], source: str, images: str
) -> list[str]:
    accuracy, memory, modules = figures["accuracy"], figures["memory"], figures["modules"]
    return [
        "# Results",
        "",
        f"Made by `python benchmarks/publish.py` from the [records of {len(records)} runs]({source}).",
        "",
        *(line for picture in pictures for line in (f"![{Path(picture).stem}]({picture})", "")),
        "## Beside the published figures",
        "",
        f"Published: test accuracy of {figures['model']}, K={modules}. {' '.join(figures['sources'])} Here: "
        f"{_protocol(records, images)}. So the accuracies cannot be compared. Compare the gaps with care: gaps grow "
        "over long training, and the published gaps say nothing about short training.",
        "",
        paper_comparison(records, accuracy, modules),
        "",
        *_reproduced(orderings(records, accuracy, modules)),
        "The table compares the peak memory of a training step with that of end-to-end training. The ratio depends on "
        "the sizes of network, image and batch, so only its direction can be compared:",
        "",
        memory_comparison(records, memory),
        "",
        "The published sources leave open:",
        "",
        *(f"- {line}" for line in figures["unknown"]),
        "",
        *comparison_sections(comparisons_of(records)),
        "## How it was measured",
        "",
        *how_measured(records),
    ]


def _reproduced(rows: Sequence[tuple[str, ...]]) -> list[str]:
    if not rows:
        return ["No ordering can be checked: no two of the published settings were run here.", ""]
    counts = Counter(row[-1] for row in rows)
    words = {
        REPRODUCED: "reproduced",
        OPPOSITE: "opposite here",
        OPEN: "open (the seeds disagree, or the difference is below twice the standard error of so many images)",
    }
    counted = "; ".join(f"{counts[verdict]} {text}" for verdict, text in words.items())
    heads = ["data", "which is more accurate", "published (points)", "here (points)", "seeds", ""]
    intro = "An ordering says which of two methods is more accurate. Of the published orderings"
    return [f"{intro} {len(rows)} can be checked: {counted}.", "", table(heads, rows, words=2), ""]


def _readme_part(records: Sequence[Record], pictures: Sequence[str], page: str, images: str) -> str:
    lines = [
        f"Measured here: {_protocol(records, images)}; ± is the standard deviation over seeds. Gaps grow over long "
        f"training. [Results]({page}) has all settings, the published figures, and how the numbers were measured."
    ]
    lines += [line for picture in pictures for line in ("", f"![accuracy and peak memory]({picture})")]
    return "\n".join([*lines, "", results_table(records, README_ROWS)])


def _protocol(records: Sequence[Record], images: str) -> str:
    """What the runs have in common, in words."""

    def words(part: str, key: str) -> str:
        return " and ".join(dict.fromkeys(markdown(getattr(record, part).get(key)) for record in records))

    kwargs = [record.config.get("model_kwargs") for record in records]
    same = kwargs[0] if all(value == kwargs[0] for value in kwargs) else None
    changes = (
        " (" + ", ".join(f"{markdown(key)} {markdown(value)}" for key, value in same.items()) + ")" if same else ""
    )
    epochs = words("result", "epochs")
    data = words("data", "name") + (f" ({images})" if images else "")
    return (
        f"{words('config', 'model')}{changes} on {data}, {words('data', 'img_size')} px, "
        f"{epochs} epoch{'' if epochs == '1' else 's'}, batch size {words('config', 'batch_size')}, "
        f"accuracy on {words('result', 'evaluated_on')} images"
    )
