"""Whether a resumed run equals one that never stopped, and a run as graphs one without, bit for bit."""

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
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        eager = train(run, folder, "eager", *flags, "--steps", last, graphs="off").sha256 if run.cuda else None
        whole = train(run, folder, "whole", *flags, "--steps", last, graphs="auto")
        train(run, folder, "parts", *flags, "--steps", first, graphs="auto")
        resumed = train(run, folder, "parts", "--resume", str(folder / "parts"), "--steps", last).sha256
        found = {"sha256": whole.sha256, "sha256_eager": eager}
    if whole.notes:
        found["not_captured"] = whole.notes[0]
    found["resumed_equals_uninterrupted"] = resumed == found["sha256"]
    found["graphs_equal_eager"] = eager == found["sha256"] if run.cuda else None
    return found
