"""What units are called."""

from collections.abc import Set

from torch import nn


def main_parts(model: nn.Module, own: list[str], split: Set[str]) -> list[str]:
    """What a unit is named after: its blocks; in a split block its largest part (an MLP, not the scale behind it)."""
    if any(part.startswith(name + ".") for name in split for part in own):
        return [max(own, key=lambda part: sum(p.numel() for p in model.get_submodule(part).parameters()))]
    return own


def unit_names(blocks: list[list[str]]) -> list[str]:
    """Names units after what their blocks have in common, or after their last block if others lie there too."""
    names = []
    for i, own in enumerate(blocks):
        others = [name for j, block in enumerate(blocks) if j != i for name in block]
        paths = [name.split(".") for name in own]
        shared = next((n for n, column in enumerate(zip(*paths, strict=False)) if len(set(column)) > 1), None)
        common = ".".join(paths[0][:shared]) if paths else "output"
        if not common or any(f"{other}.".startswith(f"{common}.") for other in others):
            common = own[-1]
        names.append(common)
    return names
