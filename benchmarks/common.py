"""Functions that benchmarks share: one writes a raw result with its machine and versions, one finds a free port."""

import json
import socket
from pathlib import Path
from typing import Any

import localprop

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


_START = localprop.provenance()  # of the code that is measured, whatever is committed while it runs


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Writes benchmarks/results/NAME.json."""
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(_START | result, indent=2) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")
    return path


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]
