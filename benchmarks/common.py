"""Writes a benchmark's raw result with what it was measured on."""

import datetime
import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def provenance() -> dict[str, Any]:
    """Commit, whether the tree differed from it, versions and machine."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--", "src", "benchmarks/*.py")),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("localprop", "torch", "timm")},
        "python": platform.python_version(),
        "cpu": cpu,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
    }


_START = provenance()  # of the code that is measured, whatever is committed while it runs


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Writes benchmarks/results/NAME.json."""
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(_START | result, indent=2) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")
    return path
