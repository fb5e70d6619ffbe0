"""The file of results: one JSON, rewritten after each row, and the machine that made it."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import timm
import torch

import localprop


class Results:
    """What has been found so far, in a file that is complete at any moment.

    Args:
        path: the file. It is written aside and renamed, so that a kill loses nothing.
        about: what stands at its top: the machine, versions, commit.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.content = path, about | {"stages": {}}
        self.write()

    def begin(self, stage: str, limit_s: float) -> None:
        """Notes that a stage has begun, with its time limit."""
        self.content["stages"][stage] = {"finished": False, "limit_s": round(limit_s, 1), "error": None, "rows": []}
        self.write()

    def row(self, stage: str, name: str, values: dict[str, Any]) -> None:
        """Adds a row to a stage, or values to the row that has that name."""
        rows = self.content["stages"][stage]["rows"]
        known = next((row for row in rows if row["name"] == name), None)
        if known is None:
            known = {"name": name}
            rows.append(known)
        known |= values
        self.write()

    def end(self, stage: str, seconds: float, error: str | None) -> None:
        """Notes how a stage has ended; `error` is one line, None where it has finished."""
        values = {"finished": error is None, "seconds": round(seconds, 1), "error": error}
        self.content["stages"][stage] |= values
        self.write()

    def write(self) -> None:
        """Writes the file."""
        aside = self.path.with_name(f"{self.path.name}.part")
        aside.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(aside, self.path)


def about_machine(device: str, dry: bool, commit: str | None) -> dict[str, Any]:
    """What made the results: `localprop.provenance()`, and the GPU with its driver. It starts CUDA.

    Args:
        device: cpu or cuda.
        dry: whether this is a dry run, whose numbers mean nothing.
        commit: the commit to note where localprop does not run from a git checkout.
    """
    made_with = localprop.provenance()
    made_with["commit"] = made_with["commit"] or commit
    about = {"dry_run": dry, "device": device, **made_with, "timm": timm.__version__}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about |= {
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "gpu_memory": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
        }
    return about


def _driver() -> str | None:
    """The version of the driver, from nvidia-smi; None without it."""
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None
