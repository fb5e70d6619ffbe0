"""Runs `localprop train` in the process of a stage, quietly."""

import contextlib
import csv
import hashlib
import io
import runpy
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import localprop
from gpu_stages.running import Run


@dataclass(frozen=True)
class Finished:
    """A training that has ended.

    Attributes:
        folder: the run folder.
        notes: the lines that say why a step was not captured as CUDA graphs; none where it was.
    """

    folder: Path
    notes: list[str]

    @property
    def sha256(self) -> str:
        """Of its weights."""
        return hashlib.sha256((self.folder / "model.safetensors").read_bytes()).hexdigest()


def train(run: Run, folder: Path, name: str, *flags: str, graphs: str | None = None) -> Finished:
    """Trains.

    Args:
        run: the stage's.
        folder: that holds run folders.
        name: of the run folder.
        flags: of `localprop train`.
        graphs: the value of `--cuda-graphs`; without CUDA it is off.

    Raises:
        RuntimeError: training failed, with its line.
    """
    words = ["train", "--device", run.device.type, "--output", str(folder), *flags]
    if "--resume" not in flags:
        words += ["--experiment", name]
    if graphs:
        words += ["--cuda-graphs", graphs if run.cuda else "off"]
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        code = _command(words)
    if code:
        lines = errors.getvalue().strip().splitlines() or [f"it ended with exit code {code}"]
        raise RuntimeError(f"localprop train: {lines[-1]}")
    return Finished(folder / name, [line for line in printed.getvalue().splitlines() if "CUDA graphs" in line])


def _command(words: list[str]) -> int:
    """Runs a `localprop` command as `python -m localprop` does, in this process; gives its exit code."""
    before, sys.argv = sys.argv, ["localprop", *words]
    try:
        runpy.run_module("localprop", run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


def throughput(folder: Path) -> dict[str, Any]:
    """What a run's results.csv says: images per second of all epochs but the first, and the peak of memory.

    The first epoch warms up and captures.
    """
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    memory = {name: int(rows[-1][name] or 0) or None for name in ("predicted_memory", "peak_memory")}
    return spread([float(row["images_per_second"]) for row in rows[1:]]) | memory


def spread(values: list[float]) -> dict[str, Any]:
    """The median of images per second, and all of them."""
    rounded = [round(value, 1) for value in values]
    return {"images_per_second": round(statistics.median(values), 1), "each": rounded}


def register_random_images(name: str, count: int, side: int) -> None:
    """Adds a dataset of random images that `--data` can name; ten classes, and 64 images to evaluate on."""
    dataset = localprop.ImageDataset(partial(_random_images, count, side), side, (0.5,) * 3, (0.29,) * 3, hflip=0.5)
    localprop.DATASETS[name] = dataset


def _random_images(count: int, side: int, folder: Path, train: bool, download: bool) -> tuple[Any, Any, list[str]]:
    size, generator = count if train else 64, torch.Generator().manual_seed(int(train))
    images = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator)
    return images, torch.arange(size) % 10, [str(digit) for digit in range(10)]
