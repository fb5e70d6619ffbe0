"""Trains what `train --budget` chooses, for a few steps on a CPU, and compares the peak with the budget.

python benchmarks/within.py        Swin-Tiny at batch 128 and ViT-B at batch 64 (bf16), within 4 GiB, exact and local:
                                   about 8 minutes on one core
--models NAME ... takes some of the models only; results of others in the file stay.

Images are random: neither time nor accuracy is looked at. Writes benchmarks/results/within.json.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import RESULTS, write_result
from PIL import Image

BUDGET, STEPS = 4 * 2**30, 2
MODELS = {
    "swin_tiny_patch4_window7_224": ["--batch-size", "128"],
    "vit_base_patch16_224": ["--batch-size", "64", "--amp"],
}
KINDS = {"exact": [], "local": ["--reach", "1"]}
KEPT = ("method", "modules", "cuts", "recompute_units", "split_blocks", "reach", "batch_size", "micro_batches", "amp")


def images(folder: Path, count: int) -> None:
    """Writes random images of two classes, enough for a few batches."""
    draw = np.random.default_rng(0)
    for part, size in (("train", count), ("val", 4)):
        for number in range(size):
            place = folder / part / str(number % 2)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (32, 32, 3), np.uint8)).save(place / f"{number}.png")


def trained(model: str, flags: list[str], folder: Path) -> dict:
    """What a run within the budget has chosen, and its peak as it was predicted and measured."""
    import yaml

    command = ["train", "--model", model, "--data", f"folder:{folder}", "--img-size", "224", "--budget", "4GiB"]
    command += [*MODELS[model], *flags, "--steps", str(STEPS), "--epochs", "2", "--device", "cpu"]
    with tempfile.TemporaryDirectory() as output:
        words = [sys.executable, "-m", "localprop", *command, "--output", output, "--experiment", "run"]
        subprocess.run(words, check=True)
        run = Path(output, "run")
        (row,) = csv.DictReader((run / "results.csv").read_text().splitlines())
        config = yaml.safe_load((run / "config.yaml").read_text())
    predicted, measured = (int(float(row[name])) for name in ("predicted_memory", "peak_memory"))
    chosen = {name: config[name] for name in KEPT}
    return {"flags": flags, "predicted": predicted, "measured": measured, "within": measured <= BUDGET} | chosen


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    path = RESULTS / "within.json"
    for model in parser.parse_args().models:
        rows = {}
        with tempfile.TemporaryDirectory() as folder:
            images(Path(folder), 2 * 128)
            for kind, flags in KINDS.items():
                rows[kind] = trained(model, flags, Path(folder))
                print(model, kind, rows[kind], flush=True)
        known = json.loads(path.read_text())["models"] if path.exists() else {}
        write_result("within", {"budget": BUDGET, "steps": STEPS, "models": known | {model: rows}})


if __name__ == "__main__":
    main()
