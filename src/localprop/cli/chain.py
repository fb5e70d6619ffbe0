"""`localprop chain`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from localprop.errors import listing, printable
from localprop.settings.config import ModelConfig
from localprop.settings.flags import parse


@dataclass(frozen=True)
class ChainOptions(ModelConfig):
    """The units that a model can be cut into: their output shapes and parameters."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")] = field(kw_only=True)
    """Name of a timm model, or of one that --plugin registers."""
    split_blocks: bool = False
    """Let units be parts of blocks, such as a transformer block's attention and its MLP."""


def prepare(argv: Sequence[str]) -> Callable[[], int]:
    """Reads the flags of `chain`, and imports what traces."""
    options: ChainOptions = parse(ChainOptions, "chain", argv)
    from localprop.models.backbone import create_backbone
    from localprop.models.sources import with_source
    from localprop.tracing.chains import chain

    def show_chain() -> int:
        named, _ = with_source(options)
        model = create_backbone(named, None).model
        size = (3, options.img_size, options.img_size) if options.img_size else None
        units = chain(model, size, options.split_blocks)
        channels, height, width = units.input_size
        title = Text(printable(f"{named.model}, {channels}x{height}x{width}"))
        table = Table("", "unit", "output", "parameters", title=title, box=None)
        table.columns[0].justify = table.columns[2].justify = table.columns[3].justify = "right"
        for i, unit in enumerate(units, 1):
            count = sum(model.get_parameter(name).numel() for name in unit.parameters)
            table.add_row(str(i), Text(printable(unit.name)), " x ".join(map(str, unit.shape)), f"{count:,}")
        console = Console()
        console.print(table)
        if units.whole:
            console.print(_whole_table(units.whole))
        return 0

    return show_chain


def _whole_table(whole: dict[str, str]) -> Table:
    """Why parts are not cut inside, a line for each reason."""
    table = Table("part", "why it is not cut inside", box=None)
    names: dict[str, list[str]] = {}
    for name, why in whole.items():
        names.setdefault(why, []).append(name)
    for why, own in names.items():
        table.add_row(Text(listing(own, most=3)), Text(printable(why)))
    return table
