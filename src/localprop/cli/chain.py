"""`localprop chain`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from localprop.errors import printable
from localprop.settings.config import ModelConfig
from localprop.settings.flags import parse


@dataclass(frozen=True)
class ChainOptions(ModelConfig):
    """The units that a model can be cut into: their output shapes and parameters."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")] = field(kw_only=True)
    """Name of a timm model, or of one that --plugin registers."""


def prepare(argv: Sequence[str]) -> Callable[[], int]:
    """Reads the flags of `chain`, and imports what traces."""
    options: ChainOptions = parse(ChainOptions, "chain", argv)
    from localprop.models.backbone import create_backbone
    from localprop.tracing.chains import chain

    def show_chain() -> int:
        model, _ = create_backbone(options, None)
        units = chain(model, (3, options.img_size, options.img_size) if options.img_size else None)
        channels, height, width = units.input_size
        title = Text(printable(f"{options.model}, {channels}x{height}x{width}"))
        table = Table("", "unit", "output", "parameters", title=title, box=None)
        table.columns[0].justify = table.columns[2].justify = table.columns[3].justify = "right"
        for i, unit in enumerate(units, 1):
            count = sum(model.get_parameter(name).numel() for name in unit.parameters)
            table.add_row(str(i), Text(printable(unit.name)), " x ".join(map(str, unit.shape)), f"{count:,}")
        Console().print(table)
        return 0

    return show_chain
