"""Whether a resumed run equals one that never stopped, and a run as graphs one without, bit for bit."""

import hashlib
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import localprop
from gpu_stages.running import Run
from gpu_stages.training import train

_COMMON = ("--epochs", "1", "--amp", "--modules", "2", "--partition", "stage")
_SIZE = ("--batch-size", "16")
_TINY = (
    *("--batch-size", "4", "--model-kwargs", "patch_size=4", "window_size=2"),
    *("embed_dim=8", "depths=(1,1)", "num_heads=(1,1)"),
)


def compare(run: Run) -> None:
    """Trains with each decoder in mixed precision: at once, in two parts, and without graphs."""
    for decoder in list(localprop.DECODERS)[: 1 if run.dry else None]:
        run.attempt(f"decoder {decoder}", partial(_compared, run, decoder), decoder=decoder)


def _compared(run: Run, decoder: str) -> dict[str, Any]:
    first, last = ("1", "2") if run.dry else ("4", "9")
    flags = (*_COMMON, *(_TINY if run.dry else _SIZE), "--decoder", decoder)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if run.cuda:
            found["sha256_eager"] = _digest(train(run, folder, "eager", *flags, "--steps", last, graphs="off"))
        found["sha256"] = _digest(train(run, folder, "whole", *flags, "--steps", last, graphs="auto"))
        train(run, folder, "parts", *flags, "--steps", first, graphs="auto")
        resumed = _digest(train(run, folder, "parts", "--resume", str(folder / "parts"), "--steps", last))
    found["resumed_equals_uninterrupted"] = resumed == found["sha256"]
    found["graphs_equal_eager"] = found["sha256_eager"] == found["sha256"] if run.cuda else None
    return found


def _digest(folder: Path) -> str:
    """SHA-256 of a run's weights."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
