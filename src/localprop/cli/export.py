"""`localprop export`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from localprop.cli.common import named_plugin, show_notes
from localprop.settings.flags import parse
from localprop.settings.values import OptionalPath


@dataclass(frozen=True)
class ExportOptions:
    """A run's weights and config.json as a folder that timm.create_model loads."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    output: OptionalPath = None
    """Folder to write (default: RUN/export)."""
    plugin: OptionalPath = None
    """The plugin that the run was trained with: its code runs only if it is named."""


def prepare(argv: Sequence[str]) -> Callable[[], int]:
    """Reads the flags of `export`, and imports what exports."""
    options: ExportOptions = parse(ExportOptions, "export", argv)
    plugin = named_plugin(options.run, options.plugin, ("export", *argv))
    from localprop.runs.evaluation import export_run

    def export() -> int:
        folder, code, notes = export_run(options.run, options.output, plugin)
        show_notes(notes)
        print(f"{folder}\n\n{code}")
        return 0

    return export
