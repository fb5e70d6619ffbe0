"""Writes the tables of docs/finetuning.md.

python benchmarks/publish_finetuning.py

Reads benchmarks/results/finetuning.json, which benchmarks/finetuning.py writes, and the records of the suites
finetune-vit and finetune-lite in benchmarks/results/, as far as they are there.
"""

import json
from typing import Any

import finetuned
from common import RESULTS, ROOT
from finetuned import WHOLE, Way
from publish_gpu import filled

PAGE = ROOT / "docs" / "finetuning.md"
NAMES = {
    "vit_base_patch16_224": "ViT-B/16",
    "swin_tiny_patch4_window7_224": "Swin-Tiny",
    "vit_small_patch14_dinov2": "ViT-S/14",
    "tf_efficientnet_lite0": "EfficientNet-Lite0",
}
_KINDS = {"exact": "exact", "frozen": "first half frozen", "local": "local, first module frozen"}


def main() -> None:
    """Writes the page."""
    text = PAGE.read_text(encoding="utf-8")
    for name, part in parts().items():
        text = filled(text, part, f"<!-- {name} -->", f"<!-- /{name} -->", PAGE)
    PAGE.write_text(text, encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")


def parts() -> dict[str, str]:
    """What is between the page's markers."""
    found = json.loads((RESULTS / "finetuning.json").read_text())
    return {"printed": _printed(found["printed"]), "proposals": _proposals(found["models"]), "evidence": _evidence()}


def _printed(printed: dict[str, Any]) -> str:
    lines = [_folded(f"$ {printed['command']}"), "...", *(_folded(line) for line in printed["lines"])]
    return "```\n" + "\n".join(lines) + "\n```"


def _folded(line: str, width: int = 100) -> str:
    """A line in several that end in a backslash where it is a command, else with more room before them."""
    words, lines = line.split(" "), [""]
    end = " \\" if line.startswith(("localprop", "$ ")) else ""
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) + len(end) >= width:
            lines[-1] += end
            lines.append("   ")
        lines[-1] += (" " if lines[-1] else "") + word
    return "\n".join(lines)


def _proposals(models: dict[str, Any]) -> str:
    budgets = [own["gib"] for own in next(iter(models.values()))["budgets"]]
    rows = ["| | " + " | ".join(f"{gib} GiB" for gib in budgets) + " |", "|---" * (len(budgets) + 1) + "|"]
    for name, model in models.items():
        whole = f"{model['whole'] / 2**30:.1f} GiB end-to-end"
        rows.append(f"| **{NAMES[name]}, batch {model['batch_size']}** ({whole}) |" + " |" * len(budgets))
        for kind, title in _KINDS.items():
            rows.append(f"| {title} | " + " | ".join(_cell(own, kind) for own in model["budgets"]) + " |")
    return "\n".join(rows)


def _cell(budget: dict[str, Any], kind: str) -> str:
    own = budget[kind]
    if own is None:
        return "does not fit"
    text = f"{own['setting']}: {own['peak'] / 2**30:.1f} GiB, time {own['time_ratio']:.2f}"
    return f"**{text}**" if kind == budget["taken"] else text


def _evidence() -> str:
    tasks = [task for suite in finetuned.SUITES for task in finetuned.tasks(suite)]
    if not tasks:
        names = " and ".join(f"`{name}`" for name in finetuned.SUITES)
        return f"The suites {names} have not run yet; their accuracies, memory and times will be here."
    return "\n\n".join(map(_table, tasks))


def _table(task: finetuned.Task) -> str:
    rows = [
        f"{NAMES.get(task.model, task.model)} on {task.data}, {task.protocol}:",
        "",
        "| | accuracy (%) | gap (points) | seeds | learning rate | memory | time |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for way in sorted(task.outcomes, key=lambda way: -task.gap(way)[0]):
        own, (gap, seeds) = task.outcomes[way], task.gap(way)
        mean = sum(own.accuracy.values()) / len(own.accuracy)
        costs = ("" if ratio is None else f"{ratio:.2f}" for ratio in (own.memory, own.time))
        told = "" if way == WHOLE else f"{gap:+.1f}"
        rows.append(f"| {_name(way)} | {mean:.1f} | {told} | {seeds} | {own.lr:g} | {' | '.join(costs)} |")
    return "\n".join(rows)


def _name(way: Way) -> str:
    if way.method == WHOLE.method:
        return {"": "end-to-end", "half": "first half frozen", "all": "linear probe"}[way.frozen]
    words = [f"{way.method}, K={way.modules}", *([f"reach {way.reach}"] if way.reach else [])]
    return ", ".join([*words, *(["first module frozen"] if way.frozen else [])])


if __name__ == "__main__":
    main()
