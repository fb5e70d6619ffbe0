"""What a result was made with: commit, versions and machine, to be written beside every number."""

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).parent
_CPUINFO = Path("/proc/cpuinfo")


def provenance() -> dict[str, Any]:
    """Describes what is running, where.

    Returns:
        "commit" and "dirty" (whether tracked files differed from it) of the checkout that localprop is run from, None
        where it is not run from one; "date" (UTC); "versions" of what results depend on, and of
        Python; and the machine: "cpu", "cores", "gpu" (None without one), "threads" (of this process).
    """
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions() | {"python": platform.python_version()},
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str | None]:
    """The versions of what results depend on; None of what is not installed."""
    return {name: _version(name) for name in ("localprop", "torch", "torchvision", "timm", "peft")}


def _git(*words: str) -> str | None:
    """What git says in the checkout that this file is tracked in; None where it is in none."""
    try:
        run = ["git", "-C", str(_PACKAGE)]
        subprocess.run([*run, "ls-files", "--error-unmatch", __file__], check=True, capture_output=True)
        return subprocess.run([*run, *words], check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a folder on the path, without having been installed
        return None


def _cpu() -> str:
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
