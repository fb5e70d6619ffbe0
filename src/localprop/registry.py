"""Six tables of names: methods, heads, decoders, tasks, datasets and models.

Each table maps a name to an object, or to the place where the object is defined. A place is imported when its name is
looked up, so the command line can list all names without importing torch.

To add one to localprop, write it in a file of its own and add a line here. To add one in a plugin, register it:

    @localprop.METHODS.register("mine")
    class Mine(localprop.LocalLoss): ...
"""

import importlib
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any

from localprop.errors import ConfigError, suggestion


class Registry(MutableMapping[str, Any]):
    """A table of names that plugins can add to.

    Args:
        noun: what an entry is called in messages, such as "method".
        shipped: the entries of localprop itself: name to "package.module:attribute".
    """

    def __init__(self, noun: str, shipped: Mapping[str, str]) -> None:
        self.noun = noun
        self._entries: dict[str, Any] = dict(shipped)
        self._shipped = frozenset(shipped)

    def register(self, name: str, entry: Any = None) -> Any:
        """Adds an entry. Without `entry`, it is a decorator for a class or a function.

        Returns:
            The entry, or the decorator.

        Raises:
            ConfigError: localprop itself has another entry of that name, or the name is no text.
        """
        if not isinstance(name, str):
            raise ConfigError(f'a {self.noun} is registered under a name, such as register("mine"), not {name!r}')

        def add(entry: Any) -> Any:
            self[name] = entry
            return entry

        return add if entry is None else add(entry)

    def lookup(self, name: str, also: Iterable[str] = ()) -> Any:
        """The entry of that name.

        Args:
            name: the name.
            also: further words to suggest.

        Raises:
            ConfigError: there is none; the line suggests a similar name.
        """
        if name not in self:
            raise ConfigError(f"no {self.noun} is called {name!r}; {suggestion(name, [*self, *also])}")
        return self[name]

    def __getitem__(self, name: str) -> Any:
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            return getattr(importlib.import_module(module), attribute)
        return entry

    def __setitem__(self, name: str, entry: Any) -> None:
        if name in self._shipped and name in self and self[name] is not entry:
            raise ConfigError(f"localprop has a {self.noun} called {name!r}; register yours under another name")
        self._entries[name] = entry

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<{self.noun}s: {', '.join(self)}>"


METHODS = Registry(
    "method",
    {
        "feature-reconstruction": "localprop.methods.feature_reconstruction:FeatureReconstruction",
        "infopro": "localprop.methods.infopro:InfoPro",
        "greedy": "localprop.methods.greedy:Greedy",
        "trgl": "localprop.methods.trgl:Trgl",
        "auglocal": "localprop.methods.auglocal:AugLocal",
        "lopt": "localprop.methods.lopt:Lopt",
        "distance": "localprop.methods.distance:Distance",
        "end-to-end": "localprop.methods.end_to_end:EndToEnd",
    },
)
"""Subclasses of `LocalLoss`, which see it for what to provide."""

HEADS = Registry(
    "head",
    {
        "linear": "localprop.heads.linear:LinearHead",
        "mlp": "localprop.heads.mlp:MlpHead",
        "conv": "localprop.heads.conv:ConvHead",
        "successor": "localprop.heads.successor:SuccessorHead",
    },
)
"""Module classes, called with (layout, num_outputs): features in that `Layout` to (batch, num_outputs).

One with `needs_place = True` is called with (layout, num_outputs, place) and its options, which are its parameters with
defaults. num_outputs is None there for a prediction like the network's, of any shape.
"""

DECODERS = Registry(
    "decoder",
    {
        "conv": "localprop.decoders.conv:ConvDecoder",
        "deconv": "localprop.decoders.deconv:DeconvDecoder",
        "pixel-shuffle": "localprop.decoders.pixel_shuffle:PixelShuffleDecoder",
        "transformer": "localprop.decoders.transformer:TransformerDecoder",
        "infopro": "localprop.decoders.infopro:InfoProDecoder",
    },
)
"""Module classes, called with (source, target): features in the `Layout` source to the grid of the `Layout` target,
(batch, channels, height, width)."""

TASKS = Registry("task", {"classification": "localprop.tasks.classification:Classification"})
"""What a network is trained for: subclasses of `Task`."""

DATASETS = Registry(
    "dataset",
    {
        "digits": "localprop.data.sources:DIGITS",
        "cifar10": "localprop.data.sources:CIFAR10",
        "cifar100": "localprop.data.sources:CIFAR100",
        "stl10": "localprop.data.sources:STL10",
        "svhn": "localprop.data.sources:SVHN",
        "fashion-mnist": "localprop.data.sources:FASHION_MNIST",
        "synthetic": "localprop.data.sources:SYNTHETIC",
    },
)
"""Each is an `ImageDataset`. Folders of images are not named here: `--data folder:PATH` opens one."""

MODELS = Registry("model", {})
"""Functions that build a backbone, beside those of timm, whose names need no entry.

Called with keyword arguments: num_classes (where the data decide it), img_size (if the function has that argument),
drop_path_rate (with --drop-path), pretrained=True (with --pretrained), and what --model-kwargs says. Returns a module
from images (batch, 3, img_size, img_size) to logits (batch, num_classes).
"""
