"""Settings of `localprop bench`. Field docstrings are the help."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from localprop.settings.bounds import require_within_bounds
from localprop.settings.values import OptionalNames, OptionalPath, OptionalStr, Pairs, parse_duration


@dataclass(frozen=True)
class BenchConfig:
    """Run a suite: a grid of training runs under one protocol.

    Each run has its result in a JSON file. Called again, it runs what is missing.
    `localprop bench` alone lists the shipped suites.
    `localprop bench report FOLDER` makes tables and pictures of the results.
    """

    suite: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SUITE")]
    """Name of a shipped suite, or a YAML file."""
    output: OptionalPath = None
    """Folder for the results (default: bench/ and the suite's name)."""
    only: OptionalNames = None
    """Run only those whose names match a pattern, such as 'greedy-*'."""
    list: bool = False
    """Print the names of the runs, and run nothing."""
    jobs: int = 1
    """Runs at once; the processor's cores are shared out."""
    time_limit: OptionalStr = None
    """Stop between two steps after this time, 9m or 1h30m, with everything saved; exit code 75 if runs remain."""
    data: Pairs = None
    """Folders of images in place of named datasets, such as cifar10=PATH, with PATH/train and PATH/test."""
    set: Pairs = None
    """Other settings for all runs, such as epochs=1; they are part of the result."""
    data_dir: OptionalPath = None
    """Where torchvision's datasets are, or are downloaded to."""
    download: bool = False
    """Download datasets that are not there."""
    device: OptionalStr = None
    """cpu, cuda, cuda:1, ... (default: cuda if there is one)."""
    plugin: OptionalNames = None
    """The Python files that the suite names as plugins: they run only if they are named here too."""

    def __post_init__(self) -> None:
        require_within_bounds(self)
        if self.time_limit is not None:
            parse_duration(self.time_limit, "--time-limit")
