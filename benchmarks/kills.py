"""Kills training at random moments and resumes it until it ends: the result must be the same, bit for bit.

python benchmarks/kills.py     100 kills, half an hour on two cores that do nothing else

Three layouts take turns: one process with images in memory, one process with images that workers decode, and two
processes with one module each. SIGKILL hits the command or, as often, one of the processes that it has started. Ten
seconds after the command has ended, all of these must be gone. The script compares weights, losses, accuracies and the
newest checkpoint with those of an undisturbed run. Writes benchmarks/results/kills.json.
"""

import argparse
import contextlib
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import write_result
from PIL import Image

PATIENCE = 10  # seconds for processes to end after a kill
SMALL = ["--model-kwargs", "patch_size=4", "window_size=2", "embed_dim=12", "depths=(1,1)", "num_heads=(1,2)"]
LIVELY = ["--drop-path", "0.2", "--mixup", "0.2", "--clip-grad", "1", "--model-ema", "--model-ema-decay", "0.9"]
COMMON = [*SMALL, *LIVELY, "--modules", "2", "--min-depth", "0", "--checkpoint-steps", "3", "--device", "cpu"]
IMAGES_PER_CLASS, SIDE = 64, 112


def layouts(images: Path) -> dict[str, list[str]]:
    """The flags of each layout."""
    return {
        "one process": ["--epochs", "16", "--batch-size", "64"],
        "workers": ["--data", f"folder:{images}", "--img-size", "32", "--epochs", "24", "--batch-size", "32"],
        "two processes": ["--epochs", "16", "--batch-size", "64", "--parallel", "modules", "--nproc", "2"],
    }


def draw(folder: Path) -> None:
    """Draws random pictures that are too large to be held in memory."""
    numbers = np.random.default_rng(0)
    for part, count in (("train", IMAGES_PER_CLASS), ("test", 8)):
        for shade, name in ((60, "dark"), (190, "light")):
            place = folder / part / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = numbers.normal(shade, 40, (SIDE, SIDE, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")


def start(flags: list[str], output: Path) -> subprocess.Popen[bytes]:
    """Starts the run, or resumes it if it exists."""
    run = output / "run"
    words = ["--resume", str(run)] if (run / "config.yaml").exists() else [*COMMON, *flags]
    if words[0] == "--resume" and "--parallel" in flags:
        words += flags[flags.index("--parallel") :]
    words += [] if words[0] == "--resume" else ["--output", str(output), "--experiment", "run"]
    log = (output / "log").open("ab")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "localprop", "train", *words], stdout=log, stderr=log, env=environment
    )


def descendants(process: int) -> list[int]:
    """All processes that this process and its children have started."""
    try:
        tasks = list(Path(f"/proc/{process}/task").iterdir())
        own = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:  # it has ended
        return []
    return own + [grandchild for child in own for grandchild in descendants(child)]


def alive(process: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def newest(run: Path) -> Path | None:
    return max((run / "checkpoints").glob("step-*[0-9]"), default=None) if (run / "checkpoints").is_dir() else None


def outcome(run: Path) -> dict[str, Any]:
    """All results that must be the same."""
    checkpoint = newest(run)
    assert checkpoint is not None
    files = [run / "model.safetensors", *sorted(checkpoint.glob("*.safetensors"))]
    rows = list(csv.DictReader((run / "results.csv").open()))
    same = [{k: v for k, v in row.items() if k.startswith(("epoch", "step", "lr", "train_", "test_"))} for row in rows]
    return {"rows": same, "files": {file.name: file.read_bytes() for file in files}}


def disturb(flags: list[str], output: Path, dice: random.Random, limit: int) -> dict[str, int]:
    """Trains to the end with up to `limit` kills; counts the killed processes, and those that survive too long."""
    counts = {"kills": 0, "of others": 0, "before a checkpoint": 0, "leftovers": 0}
    while True:
        before = newest(output / "run")
        process = start(flags, output)
        if counts["kills"] < limit:
            # Most kills should hit training, and some its start.
            early = dice.random() < 0.15
            while process.poll() is None and not early and newest(output / "run") == before:
                time.sleep(0.005)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(dice.uniform(0.0, 4.0 if early else 0.6))
        if counts["kills"] >= limit or process.poll() is not None:
            if process.wait():
                sys.exit(f"{output / 'log'}: exit code {process.returncode}")
            return counts
        others = descendants(process.pid)
        victim = dice.choice([process.pid, dice.choice([process.pid, *others])])
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        # A process that decodes images may have ended its work already: then the run continues, and is killed itself.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
        process.kill()
        process.wait()
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and any(map(alive, others)):
            time.sleep(0.02)
        left = [pid for pid in others if alive(pid)]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        counts["kills"] += 1
        counts["of others"] += victim != process.pid
        counts["before a checkpoint"] += newest(output / "run") is None
        counts["leftovers"] += len(left)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry-run", action="store_true", help="print, and write no result")
    options = parser.parse_args()
    dice, total, found = random.Random(options.seed), 0, []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        draw(root / "images")
        ways = layouts(root / "images")
        references = {}
        for way, flags in ways.items():
            output = root / f"reference {way}"
            output.mkdir()
            if code := start(flags, output).wait():
                sys.exit(f"{(output / 'log').read_text()}\nexit code {code}")
            references[way] = outcome(output / "run")
        while total < options.kills:
            way = list(ways)[len(found) % len(ways)]
            output = root / f"run {len(found)}"
            output.mkdir()
            counts = disturb(ways[way], output, dice, min(12, options.kills - total))
            same = outcome(output / "run") == references[way]
            found.append({"way": way, "same": same, **counts})
            total += counts["kills"]
            print(total, found[-1], flush=True)
    result = {"kills": total, "same": all(own["same"] for own in found)}
    result |= {"leftovers": sum(own["leftovers"] for own in found), "seed": options.seed, "runs": found}
    print(f"{total} kills, {len(found)} runs:", "the same, bit for bit" if result["same"] else "NOT the same")
    if not options.dry_run:
        write_result("kills", result)


if __name__ == "__main__":
    main()
