"""A page that puts suites beside published figures: gaps, orderings, length of training, memory, accuracy by module.

Every number in it is computed from records, or is one of those that the package carries.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from localprop.bench.record import Record
from localprop.bench.reports.costs import best_table, paper_memory_table, stage_cost
from localprop.bench.reports.groups import Comparison
from localprop.bench.reports.measured import suite_lines
from localprop.bench.reports.published import (
    NOT_RUN,
    Published,
    chosen_comparisons,
    gap_table,
    images_seen,
    name_of,
    ordering_lines,
)
from localprop.bench.reports.tables import NONE, ratio_text, table
from localprop.bench.reports.ways import Way, own_gap, plain_baseline, way_parts, way_words, ways_of
from localprop.bench.series import BASELINE, Series
from localprop.report.measures import ACCURACY
from localprop.report.texts import code, markdown

START, END = "<!-- results -->", "<!-- /results -->"
"""Around the part that stands for the page elsewhere, such as in a README."""
_OURS = "feature-reconstruction"
_FAMILIES = {"swin": "Swin", "vit": "ViT"}
_MAIN = [Way("greedy", 4), Way("infopro", 4), Way(_OURS, 4), Way(_OURS, 4, reach=1)]
_SHORT = [Way(_OURS, 4), Way(_OURS, 4, reach=1), Way("greedy", 4)]


def page_lines(
    suites: Mapping[str, Sequence[Record]],
    comparisons: Sequence[Comparison],
    published: Published,
    pictures: Mapping[str, str],
    made_by: str,
    note: str,
) -> list[str]:
    """Lines of Markdown.

    Args:
        suites: link to a folder of records, and these.
        comparisons: of all records.
        published: figures of papers.
        pictures: "front" and "depth" to the links of those that were drawn.
        made_by: the command that makes the page.
        note: a sentence about the data, or empty.
    """
    chosen = chosen_comparisons(comparisons, published)
    front, depth = ([f"![{words}]({pictures[key]})", ""] if key in pictures else [] for key, words in _PICTURES.items())
    return [
        "# Results",
        "",
        f"How far local learning stays behind end-to-end training, and what it saves. Made by {code(made_by)}.",
        "",
        START,
        "",
        *_short(chosen, published),
        "",
        *front,
        END,
        "",
        *_beside(chosen, published),
        "## Which method is the more accurate",
        "",
        *ordering_lines(chosen, published),
        "",
        "## Gap and length of training",
        "",
        "Gaps at K=4 in points, from the shortest training to the longest. Gaps open late; before that, local training "
        "may be ahead.",
        "",
        _length_table(comparisons, published),
        "",
        *_full_size(published),
        *([] if not chosen else ["## Accuracy by module", "", *depth, *_datasets(chosen, published)]),
        *_runs(suites, published, note),
    ]


_PICTURES = {
    "front": "gap to end-to-end training against memory and time",
    "depth": "accuracy of each module's head",
}


def _beside(chosen: Mapping[str, Comparison], published: Published) -> list[str]:
    return [
        "## Beside the published figures",
        "",
        f"Gaps to end-to-end training in points. Published: {published.network}. {' '.join(published.sources)} "
        "Here: smaller networks and shorter training ([what was run](#what-was-run)), so accuracies cannot be "
        "compared, and gaps with care. The decoder is `pixel-shuffle` where none is named.",
        "",
        gap_table(chosen, published, published.modules),
        "",
        "Accuracies at K=2 are not in these sources:",
        "",
        gap_table(chosen, published, 2),
        "",
    ]


def _full_size(published: Published) -> list[str]:
    return [
        "## Memory and time at full size",
        "",
        "Swin-Tiny at 224 px, batch 128, AdamW, predicted for CUDA, relative to end-to-end training. First on the "
        "paper's terms: peak memory in float32, nothing recomputed, a module for each stage at K=4, and a cut after "
        "the first stage at K=2. How the paper measured is not published.",
        "",
        paper_memory_table(published),
        "",
        "Then local training at its best, beside exact training, which loses no accuracy. Mixed precision with "
        "bfloat16, eager steps. The last column is the time of the fastest exact training that fits into the "
        "same memory.",
        "",
        best_table(),
        "",
    ]


def _runs(suites: Mapping[str, Sequence[Record]], published: Published, note: str) -> list[str]:
    return [
        "## What was run",
        "",
        *([note, ""] if note else []),
        "Accuracy is the network's after the last epoch; no epoch is chosen. ± is the sample standard deviation over "
        "seeds. A gap is the mean difference from end-to-end training with the same seed and the same kinetic term.",
        "",
        *(line for link, records in suites.items() for line in suite_lines(link, records)),
        "",
        "The published sources do not say:",
        "",
        *(f"- {line}" for line in published.unknown),
    ]


def by_module(chosen: Mapping[str, Comparison], published: Published) -> list[Comparison]:
    """The comparisons for a picture by module: end-to-end training and the main ways at K=4, under short names."""
    shown = [Way(BASELINE, 1), *_MAIN]
    result = []
    for data, comparison in chosen.items():
        ways = ways_of(comparison)
        series = [replace(ways[way], short=", ".join([_brief(way), *way_parts(way)])) for way in shown if way in ways]
        result.append(replace(comparison, name=published.names.get(data, data), series=series))
    return result


def _brief(way: Way) -> str:
    return BASELINE if way.method == BASELINE else f"K={way.modules}"


def _short(chosen: Mapping[str, Comparison], published: Published) -> list[str]:
    """The five rows that say it all."""
    datas = list(published.accuracy)
    first = []
    for data in datas:
        baseline = plain_baseline(chosen[data]) if data in chosen else None
        first.append(f"{baseline.score.mean:.2f}%" if baseline and baseline.score else NOT_RUN)
    rows = [[BASELINE, *_costs(Way(BASELINE, 1)), *first]]
    rows.append(["exact, in four modules", *_costs(Way(BASELINE, 4)), *("0" for _ in datas)])
    for way in _SHORT:
        gaps = []
        for data in datas:
            series = ways_of(chosen[data]).get(way) if data in chosen else None
            gap = own_gap(chosen[data], series) if series else None
            gaps.append(f"{gap.mean:+.2f}" if gap else NOT_RUN)
        rows.append([way_words(way), *_costs(way), *gaps])
    return [
        table(["K=4", "memory", "time", *(name_of(data, published) for data in datas)], rows),
        "",
        "Under each dataset: the accuracy of end-to-end training, and the gaps of the others to it in points. Memory "
        "and time are those of a step of Swin-Tiny at 224 px (batch 128, bfloat16, eager, predicted for CUDA), "
        "relative to end-to-end training; the accuracies are of [smaller networks](#what-was-run). Local rows are cut "
        "by stage, as those networks were; [other cuts](#memory-and-time-at-full-size) take less memory.",
    ]


def _costs(way: Way) -> list[str]:
    cost = stage_cost(way)
    return [ratio_text(value) for value in ((cost.memory, cost.time) if cost else (None, None))]


def _length_table(comparisons: Sequence[Comparison], published: Published) -> str:
    rows = []
    shown = [c for c in comparisons if c.baseline and c.measure == ACCURACY]
    for comparison in sorted(shown, key=lambda c: (images_seen(c), c.name)):
        found = [_alike(comparison, way) for way in _MAIN]
        gaps = [own_gap(comparison, one) if one else None for one in found]
        baseline = plain_baseline(comparison)
        if any(gaps) and baseline and baseline.score:
            cells = [f"{gap.mean:+.2f}" if gap else NONE for gap in gaps]
            trained = f"{images_seen(comparison):,} images, {_protocol(comparison, published)}"
            rows.append([trained, f"{baseline.score.mean:.2f}", *cells])
    heads = ["trained on", "end-to-end (%)", *map(way_words, _MAIN)]
    return table(heads, rows)


def _alike(comparison: Comparison, way: Way) -> Series | None:
    """The series of a way, with the suite's own decoder where it has not run the default one."""
    series = ways_of(comparison)
    others = (own for other, own in series.items() if replace(other, decoder=None) == way)
    return series.get(way) or next(others, None)


def _protocol(comparison: Comparison, published: Published) -> str:
    """Data, size of the images and network in words."""
    record = next(iter(comparison.series[0].records.values()))
    model = str(record.config.get("model"))
    family = _FAMILIES.get(model.partition("_")[0]) or markdown(model)
    size = (record.network.get("parameters") or 0) / 1e6
    data = name_of(comparison.data, published)
    return f"{data}, {record.data['img_size']} px, {family} of {size:.1f} M parameters, {_part(record)} images"


def _part(record: Record) -> str:
    part = markdown(record.result["evaluated_on"])
    return "held-out" if part == "validation" else part


def _datasets(chosen: Mapping[str, Comparison], published: Published) -> list[str]:
    lines = []
    for comparison in chosen.values():
        record = next(iter(comparison.series[0].records.values()))
        epochs, data = record.result["epochs"], record.data
        lines += [
            f"{_protocol(comparison, published)} ({data['evaluated_images']:,}); {epochs} "
            f"{'epochs' if epochs > 1 else 'epoch'} of {data['train_images']:,} images:",
            "",
            _module_table(comparison),
            "",
        ]
    return lines


def _module_table(comparison: Comparison) -> str:
    """Accuracy of the network and of the heads before it: a row for each way."""
    rows = []
    for way, series in sorted(ways_of(comparison).items(), key=lambda item: (item[0].modules, item[0].order)):
        *inner, _ = series.module_scores or [None]
        heads = (
            ", ".join(NONE if score is None else f"{score:.1f}" for score in inner) if way.method != BASELINE else ""
        )
        gap = None if series.undivided else own_gap(comparison, series)
        cells = [series.score.text() if series.score else NONE, str(len(series.records)), gap.text("+") if gap else ""]
        rows.append([f"{way_words(way)}, K={way.modules}" if way.modules > 1 else way_words(way), *cells, heads])
    return table(["", "accuracy (%)", "seeds", "gap (points)", "heads of the modules before the last (%)"], rows)
