"""`localprop eval`."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from localprop.cli.common import named_plugin, show_notes
from localprop.settings.flags import parse
from localprop.settings.values import OptionalFloat, OptionalInt, OptionalPath, OptionalStr


@dataclass(frozen=True)
class EvalOptions:
    """Accuracy of a run's weights on its test images, or on others."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    data: OptionalStr = None
    """Other data, such as folder:PATH (default: the run's own)."""
    data_dir: OptionalPath = None
    """Where torchvision's datasets are (default: the run's own)."""
    batch_size: OptionalInt = None
    """Images per batch (default: the run's own)."""
    val_split: OptionalFloat = None
    """Evaluate on that part of the training images instead, as a run with the same --val-split does."""
    download: bool = False
    """Download the dataset if it is not there."""
    device: OptionalStr = None
    """cpu, cuda, ... (default: cuda if there is one)."""
    plugin: OptionalPath = None
    """The plugin that the run was trained with: its code runs only if it is named."""


def prepare(argv: Sequence[str]) -> Callable[[], int]:
    """Reads the flags of `eval`, and imports what evaluates."""
    options: EvalOptions = parse(EvalOptions, "eval", argv)
    names = ("data", "data_dir", "batch_size", "val_split", "download", "device")
    changes = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    plugin = named_plugin(options.run, options.plugin, ("eval", *argv))
    from localprop.runs.evaluation import evaluate_run

    def evaluate() -> int:
        result, notes = evaluate_run(options.run, changes, plugin)
        show_notes(notes)
        print(json.dumps(result, indent=2))
        return 0

    return evaluate
