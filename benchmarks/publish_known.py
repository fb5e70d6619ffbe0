"""Writes src/localprop/planning/known.yaml, what accuracy local learning is known to cost.

python benchmarks/publish_known.py

Reads src/localprop/bench/published.yaml (published figures), benchmarks/results/gpu_ba3b577/race.json (a race of
prototypes on an H200), benchmarks/results/gap/ and benchmarks/results/gap-vit/ (records of `localprop bench gap` and
`gap-vit`), and where they are there finetune-vit/ and finetune-lite/ beside them.
"""

import json
import sys
from statistics import mean
from typing import Any

import finetuned
import yaml
from common import RESULTS, ROOT

TARGET = ROOT / "src" / "localprop" / "planning" / "known.yaml"
# Lanes of the race: method, reach and kinetic term of each that is a setting of localprop.
_LANES: dict[str, tuple[str, int, bool]] = {
    "fr": ("feature-reconstruction", 0, False),
    "greedy": ("greedy", 0, False),
    "la": ("feature-reconstruction", 1, True),
}


def main() -> int:
    """Returns the exit code."""
    TARGET.write_text(content(), encoding="utf-8")
    print(f"wrote {TARGET.relative_to(ROOT)}")
    return 0


def content() -> str:
    """The text of the file."""
    head = "# Gaps to end-to-end training in points. Written by `python benchmarks/publish_known.py`.\n"
    groups = [_published(), _race(), _suite("gap", "Swin"), _suite("gap-vit", "ViT"), *_finetuned()]
    return head + yaml.safe_dump(groups, sort_keys=False, width=120, default_flow_style=None)


def _published() -> dict[str, Any]:
    published = yaml.safe_load((ROOT / "src" / "localprop" / "bench" / "published.yaml").read_text(encoding="utf-8"))
    accuracy = {name: own for name, own in published["accuracy"].items() if own}
    rows = [
        {
            "method": method,
            "modules": published["modules"],
            "gaps": [round(own[method] - own["end-to-end"], 2) for own in accuracy.values()],
            "seeds": None,
        }
        for method in ("feature-reconstruction", "greedy", "infopro")
    ]
    data = ", ".join(published["names"][name] for name in accuracy)
    return {"protocol": f"published: {published['network']}; {data}", "rows": rows}


def _race() -> dict[str, Any]:
    lanes = json.loads((RESULTS / "gpu_ba3b577" / "race.json").read_text())["lanes"]
    last = {name: lane["log"][-1] for name, lane in lanes.items()}
    rows = []
    for name, (method, reach, kinetic) in _LANES.items():
        gap = round(last[name]["acc"][-1] - last["e2e"]["acc"][-1], 2)
        rows.append({"method": method, "modules": 4, **_parts(reach, kinetic), "gaps": [gap], "seeds": 1})
    epochs = last["e2e"]["epoch"]
    return {"protocol": f"a prototype: Swin-Tiny, CIFAR-10, 32 px, {epochs} of 44 epochs, an H200", "rows": rows}


def _suite(name: str, model: str) -> dict[str, Any]:
    """Gaps of a suite's records: of the seeds that both have, to end-to-end training with the same kinetic weight.

    Records with cuts by name are left out: what they say holds there.
    """
    accuracy: dict[tuple[Any, ...], dict[int, float]] = {}
    records = [json.loads(path.read_text()) for path in sorted((RESULTS / name).glob("*.json"))]
    for record in records:
        config = record["config"]
        if config["head"] not in (None, "mlp") or config["method_kwargs"] or config["cuts"]:
            continue
        parts = (config.get("reach") or 0, config.get("kinetic") or 0.0, config.get("finish") or 0.0)
        kind = (config["method"], config["modules"] or 1, *parts)
        accuracy.setdefault(kind, {})[config["seed"]] = record["result"]["accuracy"]
    rows = []
    for (method, modules, reach, kinetic, finish), own in sorted(accuracy.items()):
        base = accuracy.get(("end-to-end", 1, 0, kinetic, 0.0), {})
        both = [seed for seed in own if seed in base]
        if method == "end-to-end" or not both:
            continue
        gap = round(mean(own[seed] - base[seed] for seed in both), 2)
        parts = _parts(reach, bool(kinetic), finish)
        rows.append({"method": method, "modules": modules, **parts, "gaps": [gap], "seeds": len(both)})
    config = records[0]["config"]
    size, epochs = config["img_size"], config["epochs"]
    return {"protocol": f"a small {model}, CIFAR-10, {size} px, {epochs} epochs, held-out images", "rows": rows}


def _finetuned() -> list[dict[str, Any]]:
    """Gaps of fine-tuning: of each way to train at the best of its learning rates."""
    groups = []
    for task in (task for suite in finetuned.SUITES for task in finetuned.tasks(suite)):
        rows = []
        for way in sorted(way for way in task.outcomes if way != finetuned.WHOLE and way.frozen != "all"):
            gap, seeds = task.gap(way)
            parts = {**_parts(way.reach, False), "trained": True, **({"frozen": way.frozen} if way.frozen else {})}
            rows.append({"method": way.method, "modules": way.modules, **parts, "gaps": [gap], "seeds": seeds})
        groups.append({"protocol": f"fine-tuning, {task.model}, {task.data}, {task.protocol}", "rows": rows})
    return groups


def _parts(reach: int, kinetic: bool, finish: float = 0.0) -> dict[str, Any]:
    parts: dict[str, Any] = {"reach": reach, "kinetic": kinetic, "finish": finish}
    return {name: value for name, value in parts.items() if value}


if __name__ == "__main__":
    sys.exit(main())
