"""Writes the tables of rivals in docs/memory.md, between `<!-- rivals -->` and `<!-- /rivals -->`, and their picture.

python benchmarks/publish_alternatives.py

Reads benchmarks/results/alternatives_predicted.json and alternatives_measured.json, which benchmarks/alternatives.py
writes, and benchmarks/results/gpu_ba3b577/measure224.json; writes docs/memory-rivals.png beside the page.
"""

import itertools
import json
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from common import RESULTS, ROOT
from matplotlib import pyplot as plt
from publish_gpu import filled
from rivals import rivals

from localprop.bench.reports.placing import label_points

PAGE = ROOT / "docs" / "memory.md"
PICTURE = ROOT / "docs" / "memory-rivals.png"
START, END = "<!-- rivals -->", "<!-- /rivals -->"
NAMES = {
    "swin_tiny_patch4_window7_224": "Swin-Tiny",
    "vit_small_patch16_224": "ViT-S",
    "vit_base_patch16_224": "ViT-B",
    "convnext_tiny": "ConvNeXt-Tiny",
}
COLOURS = {"exact": "#0b6e99", "local": "#d1495b", "other numbers": "#8d99ae", "fine-tuning": "#8d99ae"}
UNTIMED = "8-bit AdamW"
"""Its time is not predicted: on CUDA torchao compiles its step."""
_STAGES = " (stages 0 and 1)"
# Of the rows of measure224.json: what they are called here.
_GPU = {
    "timm checkpointing": "each block checkpointed (timm's)",
    "segmented exact K=4": "exact K=4 (a prototype, on the cuts of local K=4)",
    "checkpoint stages 0,1": f"first half checkpointed{_STAGES}",
    "micro /4 + checkpointing": "4 micro-batches, each block checkpointed",
    "K=2": "local K=2",
    "K=4": "local K=4",
    "K=8 split": "local K=8, split",
}


def main() -> None:
    """Writes the page and the picture."""
    predicted, measured = (_models(f"alternatives_{kind}") for kind in ("predicted", "measured"))
    gpu = json.loads((RESULTS / "gpu_ba3b577" / "measure224.json").read_text())
    draw(predicted)
    sections = [
        f"Predicted for CUDA, bf16, AdamW, 224 px, at batch {_batches(predicted)}: **memory**, and expected time of a "
        "step, relative to end-to-end training ([raw result](../benchmarks/results/alternatives_predicted.json), "
        '[script](../benchmarks/alternatives.py)). "First half" is the stem with stages 0 and 1, or with half of the '
        'blocks; "split" allows cuts inside blocks.',
        _table(predicted, _predicted),
        f"![memory against time of every rival]({PICTURE.name})",
        "What local learning costs in accuracy is that of feature reconstruction, from best to worst of what is known "
        "([results](results.md), [lab notes](lab-notes.md)); for most of these models it was not tried.",
    ]
    if measured:
        sections += [
            f"Measured on one thread of a CPU, fp32, batch {_batches(measured)}, relative to end-to-end training: "
            "**memory**, time where it was taken, and how far the prediction of that very step is off "
            "([raw result](../benchmarks/results/alternatives_measured.json)). At so small a batch weights and moments "
            "take a larger part than above.",
            _table(measured, _measured),
        ]
    sections += [
        f"Measured on an {gpu['gpu']} at commit ba3b577, Swin-Tiny, batch 128, bf16 "
        "([raw result](../benchmarks/results/gpu_ba3b577/measure224.json)), beside what is predicted now:",
        gpu_table(gpu["rows"], predicted["swin_tiny_patch4_window7_224"]["rows"]),
    ]
    text = "\n\n".join(sections)
    PAGE.write_text(filled(PAGE.read_text(), text, START, END, PAGE))
    print(f"wrote {PAGE} and {PICTURE}")


def _models(name: str) -> dict[str, Any]:
    path = RESULTS / f"{name}.json"
    found = json.loads(path.read_text())["models"] if path.exists() else {}
    names = [rival.name for rival in rivals()]  # in whose order each model has its rows, whenever they were made
    models = {model: found[model] for model in NAMES if model in found}
    return {
        model: own | {"rows": {name: own["rows"][name] for name in names if name in own["rows"]}}
        for model, own in models.items()
    }


def _batches(models: dict[str, Any]) -> str:
    sizes = {found["batch_size"] for found in models.values()}
    if len(sizes) == 1:
        return str(sizes.pop())
    return ", ".join(f"{found['batch_size']} ({NAMES[model]})" for model, found in models.items())


def _predicted(row: dict[str, Any]) -> str:
    if "not_run" in row:
        return "–"
    time = "" if row["not_timed"] else f" / {row['time_ratio']:.2f}"
    return f"**{row['memory_ratio']:.3f}**{time}"


def _measured(row: dict[str, Any]) -> str:
    if "not_run" in row:
        return "–"
    time = f" / {row['time_ratio']:.2f}" if "time_ratio" in row else ""
    return f"**{row['memory_ratio']:.3f}**{time} ({round(row['error_percent'], 1) + 0:+.1f}%)"


def _table(models: dict[str, Any], cell: Callable[[dict[str, Any]], str]) -> str:
    """A row for each rival, and a column for each model."""
    first = next(iter(models.values()))["rows"]
    names = [NAMES[model] for model in models]
    costs = {rival.name: rival.accuracy for rival in rivals()}  # as known now
    lines = [f"| | {' | '.join(names)} | gradients exact | known cost in accuracy |", "|---" * (len(names) + 3) + "|"]
    for name, row in first.items():
        cells = [cell(_timed(name, found["rows"][name])) for found in models.values()]
        kind = "" if row["kind"] in ("exact", "local") else f" ({row['kind']})"
        lines.append(f"| {name}{kind} | {' | '.join(cells)} | {row['gradients']} | {costs[name]} |")
    return "\n".join(lines)


def _timed(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """The row, and whether its time is not predicted."""
    return row | {"not_timed": name == UNTIMED}


def gpu_table(rows: list[dict[str, Any]], predicted: dict[str, Any]) -> str:
    """What a GPU measured, beside predictions."""
    own = {row["name"]: row for row in rows if row["amp"]}
    first = own["end-to-end"]
    lines = ["| | memory | time | predicted memory | predicted time |", "|---|---|---|---|---|"]
    for name, shown in _GPU.items():
        row, expected = own[name], predicted.get(shown.removesuffix(_STAGES))
        memory, time = row["peak"] / first["peak"], row["ms"] / first["ms"]
        beside = (
            "| – | – |" if expected is None else f"| {expected['memory_ratio']:.3f} | {expected['time_ratio']:.2f} |"
        )
        lines.append(f"| {shown} | {memory:.3f} | {time:.2f} {beside}")
    return "\n".join(lines)


def draw(models: dict[str, Any]) -> None:
    """Memory against time: a panel for each model, exact and local training in two colours, and the front of each."""
    count = len(models)
    figure, panels = plt.subplots(-(-count // 2), min(count, 2), figsize=(14, 5.2 * -(-count // 2)), squeeze=False)
    labelled = []
    for axes in panels.flat[count:]:
        axes.set_visible(False)
    for axes, (model, found) in zip(panels.flat, models.items(), strict=False):
        numbered = enumerate(found["rows"].items(), 1)
        rows = {number: row for number, (name, row) in numbered if "not_run" not in row and name != UNTIMED}
        points = np.array([[row["time_ratio"], row["memory_ratio"]] for row in rows.values()])
        colours = [COLOURS[row["kind"]] for row in rows.values()]
        axes.scatter(*points.T, color=colours, s=42, zorder=3)
        lines: list[tuple[float, float]] = []  # not to be written over
        for kind in ("exact", "local"):
            own = sorted(tuple(p) for p, row in zip(points, rows.values(), strict=True) if row["kind"] == kind)
            front = [p for i, p in enumerate(own) if all(p[1] < other[1] for other in own[:i])]
            lines += [corner for (_, y), (x, low) in itertools.pairwise(front) for corner in ((x, y), (x, low))]
            axes.step(*zip(*front, strict=True), where="post", color=COLOURS[kind], alpha=0.6, label=f"{kind} training")
        axes.set(title=f"{NAMES[model]}, batch {found['batch_size']}", xlabel="expected time of a step", ylim=(0, 1.05))
        axes.set_ylabel("peak memory")
        axes.set_xscale("log")
        axes.set_xticks([0.6, 0.8, 1, 1.25, 1.5, 2, 3, 5, 10], ["0.6", "0.8", "1", "1.25", "1.5", "2", "3", "5", "10"])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.legend(loc="upper right", frameon=False)
        labelled.append((axes, points, np.array(lines), list(map(str, rows)), colours))
    legend = [f"{number} {name}" for number, name in enumerate(found["rows"], 1) if name != UNTIMED]
    lines = [", ".join(legend[i : i + 6]) for i in range(0, len(legend), 6)]
    figure.suptitle("Memory and time of a step relative to end-to-end training, predicted for CUDA, bf16")
    figure.text(0.02, 0.01, "\n".join(lines), fontsize=9)
    figure.tight_layout(rect=(0, 0.03 + 0.022 * len(lines), 1, 1))
    for axes, points, line, texts, colours in labelled:  # when the limits are final
        label_points(axes, points, np.zeros(len(points)), line, texts, colours)
    figure.savefig(PICTURE, dpi=100)


if __name__ == "__main__":
    main()
