"""Measures the overhead of `localprop bench` over the `localprop train` commands that it runs.

python benchmarks/bench_overhead.py     about 5 minutes

Runs the same training alternately by hand and in a suite of one run, and compares the seconds that the trainer counts,
the processor time of the training process, and the wall clock of the whole command. Writes
benchmarks/results/bench_overhead.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from common import write_result

SETTINGS = {
    "data": "digits",
    "model_kwargs": {"patch_size": 2, "window_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4]},
    "epochs": 8,
    "val_interval": 8,
    "seed": 1,
}


def run(words: list[str]) -> dict[str, float]:
    """Runs a command of localprop; returns its wall-clock time, and its processor time with that of its processes."""
    before, started = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-m", "localprop", *words], check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return {"wall": time.perf_counter() - started, "processor": processor}


def trained(folder: Path) -> float:
    """Seconds of the run, as its trainer counted them."""
    last = (folder / "results.csv").read_text().splitlines()[-1]
    return float(last.rpartition(",")[2])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {"train": [], "bench": []}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        settings = root / "run.yaml"
        settings.write_text(yaml.safe_dump(SETTINGS))
        suite = root / "one.yaml"
        suite.write_text(json.dumps({"description": "", "settings": SETTINGS, "runs": [{}]}))
        for turn in range(options.rounds):
            by_hand = ["train", "-c", str(settings), "--output", str(root), "--experiment", f"train-{turn}"]
            rows["train"].append(run(by_hand) | {"seconds": trained(root / f"train-{turn}")})
            folder = root / f"bench-{turn}"
            rows["bench"].append(run(["bench", str(suite), "--output", str(folder)]))
            rows["bench"][-1]["seconds"] = trained(folder / "runs" / "run")
            print(turn + 1, rows["train"][-1], rows["bench"][-1], flush=True)
    ratios = {
        key: round(statistics.median(b[key] / a[key] for a, b in zip(rows["train"], rows["bench"], strict=True)), 4)
        for key in rows["train"][0]
    }
    print(ratios)
    write_result("bench_overhead", {"settings": SETTINGS, "rounds": options.rounds, "ratios": ratios, "rows": rows})


if __name__ == "__main__":
    main()
