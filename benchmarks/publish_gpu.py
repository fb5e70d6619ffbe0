"""Writes the tables of docs/gpu.md, between `<!-- results -->` and `<!-- /results -->`.

python benchmarks/publish_gpu.py

Reads benchmarks/results/gpu.json, which benchmarks/gpu.py writes. As long as there is none, the tables are those of the
measurements in benchmarks/results/gpu_ba3b577/.
"""

import json
import sys
from pathlib import Path
from typing import Any

from gpu_stages.tables import MIB, report, table

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "gpu.md"
RESULTS = ROOT / "benchmarks" / "results"
EARLIER = RESULTS / "gpu_ba3b577"
START, END = "<!-- results -->", "<!-- /results -->"
# The rows of EARLIER / "measure224.json" in words; `K=4` stands for local learning in four modules.
_NAMES = {
    "end-to-end": "end-to-end",
    "timm checkpointing": "checkpointing of each block, timm's",
    "checkpoint stages 0,1": "checkpointing of stages 0 and 1",
    "segmented exact K=4": "end-to-end, recomputed module by module (4 modules)",
    "micro /4 + checkpointing": "4 micro-batches, with checkpointing",
    "K=2": "K=2",
    "K=4": "K=4",
    "K=4 no recompute": "K=4, `--recompute False`",
    "K=4 stage": "K=4, a module for each stage",
    "K=4 greedy": "K=4, greedy",
    "K=4 checkpointing": "K=4, with checkpointing",
    "K=8 split": "K=8, cuts inside blocks",
}
_LANES = {"e2e": "end-to-end", "greedy": "greedy, K=4", "fr": "feature reconstruction, K=4"}


def main() -> int:
    """Returns the exit code: 0, or 2 if the results are those of a dry run."""
    results = RESULTS / "gpu.json"
    content = json.loads(results.read_text()) if results.exists() else None
    if content and content["dry_run"]:
        print(f"publish_gpu: {results} is of a dry run; run benchmarks/gpu.py on a GPU", file=sys.stderr)
        return 2
    text = report(content) if content else earlier()
    PAGE.write_text(filled(PAGE.read_text(), text))
    print(f"wrote {PAGE}")
    return 0


def filled(page: str, text: str, start: str = START, end: str = END, path: Path = PAGE) -> str:
    """The page with `text` between its markers."""
    before, opened, rest = page.partition(start)
    _, closed, after = rest.partition(end)
    if not (opened and closed):
        raise ValueError(f"{path} lacks the lines {start} and {end}")
    return f"{before}{start}\n\n{text}\n\n{end}{after}"


def earlier() -> str:
    """What was measured before benchmarks/gpu.py existed."""
    steps = json.loads((EARLIER / "measure224.json").read_text())
    race = json.loads((EARLIER / "race.json").read_text())
    folder = f"../benchmarks/results/{EARLIER.name}"
    return "\n\n".join(
        [
            "**Not run on CUDA yet:** this script, the tests marked `gpu`, and so everything that came after commit "
            "ba3b577, such as `--cuda-graphs`, `net.capture`, masked steps, `--deterministic` and decoders that repeat "
            "bit for bit. Tests on a CPU check what can be checked there.",
            f"The tables are of an {steps['gpu']} at commit ba3b577, with torch {steps['torch']} and timm "
            f"{steps['timm']}. Scripts outside the repository measured them ([raw results]({folder}), with what each "
            "row is).",
            "Swin-Tiny, 224 px, batch 128, AdamW, eager, decoder `conv`: peak of allocated memory and median time of a "
            "step, each with its ratio to end-to-end training in the same run. K=4 recomputes cheap results unless its "
            "row says otherwise.",
            _steps_table(steps["rows"]),
            f"Swin-Tiny, 32 px, patch 2, window 4, batch {race['args']['batch']}, bf16, nothing recomputed: the time "
            "of an eager step, and of the same step, captured by a prototype as one CUDA graph.",
            _race_table(race["lanes"]),
        ]
    )


def _steps_table(rows: list[dict[str, Any]]) -> str:
    known = {(row["name"], row["amp"]): row for row in rows}
    lines = []
    for name, words in _NAMES.items():
        cells = [words]
        for amp in (True, False):
            row, base = known.get((name, amp)), known["end-to-end", amp]
            if row is None:
                cells += ["", "", "", ""]
                continue
            cells += [f"{row['peak'] / MIB:.0f}", f"{row['peak'] / base['peak']:.3f}"]
            cells += [f"{row['ms']:.1f}", f"{row['ms'] / base['ms']:.2f}"]
        lines.append(cells)
    heads = ("bf16: MiB", "ratio", "ms", "ratio", "fp32: MiB", "ratio", "ms", "ratio")
    return table(["", *heads], lines)


def _race_table(lanes: dict[str, Any]) -> str:
    lines = []
    for name, words in _LANES.items():
        eager, graph = lanes[name]["eager_ms"], lanes[name]["alone_ms"]
        lines.append([words, f"{eager:.1f}", f"{graph:.1f}", f"{eager / graph:.2f}"])
    return table(["", "eager: ms", "one graph: ms", "times as fast"], lines)


if __name__ == "__main__":
    sys.exit(main())
