"""Units, the parts of a backbone between the places where exactly one tensor crosses, and the chain that they make.

A unit's code is generated from the traced graph and runs *on the backbone itself*: it looks modules and parameters
up there at each call. Nothing is copied, so the backbone stays usable, keeps its `state_dict` keys, and may be
moved, copied, frozen or trained by other code at any time. Forward hooks on blocks and layers run; those on a module
that the chain cuts open (a stage, a block that is split, the backbone itself) do not. What such a module computes
itself, outside the modules it calls, follows the mode (train or eval) of the backbone.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.checkpoint import checkpoint

from localprop.errors import ChainError, suggestion
from localprop.tracing.blocks import has_adapters
from localprop.tracing.code import Code


@dataclass(frozen=True)
class Unit:
    """A part of the backbone between two places where exactly one tensor crosses.

    Attributes:
        name: qualified name of the block in the backbone, or of the part of a block.
        shape: shape of the output, batch axis left out.
        parameters: qualified names of the parameters it used when it was traced; see `used`.
        depth: number of blocks, or parts of split blocks, in it; 0 for a stem, a downsampling, the classifier. In a
            model without lists of blocks, 1.
        buffers: qualified names of the buffers it uses, such as batch norm's statistics.
    """

    name: str
    shape: tuple[int, ...]
    parameters: tuple[str, ...]
    code: dict[bool, Code] = field(repr=False)  # by whether the backbone is in training mode
    switches: tuple[str, ...] = field(repr=False)  # modules on which timm's set_grad_checkpointing sets a flag
    depth: int = 1
    buffers: tuple[str, ...] = ()
    modules: tuple[str, ...] = field(default=(), repr=False)  # that it calls
    tensors: tuple[str, ...] = field(default=(), repr=False)  # of the backbone that it uses beside those

    def used(self, backbone: nn.Module, members: Callable[[nn.Module], Iterable[Tensor]]) -> Iterator[Tensor]:
        """The parameters or buffers that it uses as the backbone is now: adapters may have been added since.

        Args:
            backbone: the model.
            members: `nn.Module.parameters` or `nn.Module.buffers`.

        Raises:
            ChainError: a module that it calls is no longer there.
        """
        try:
            for name in self.modules:
                yield from members(backbone.get_submodule(name))
            for name in self.tensors:
                place, _, leaf = name.rpartition(".")
                owner = backbone.get_submodule(place)
                if is_parametrized(owner, leaf):
                    yield from members(owner.parametrizations[leaf])  # type: ignore[index, arg-type]
                else:
                    yield getattr(owner, leaf)
        except AttributeError as error:
            raise ChainError(
                f"the backbone was changed where unit {self.name} uses it ({error}); call localize again, after the "
                "change"
            ) from None

    def trains(self, backbone: nn.Module) -> bool:
        """Whether any parameter that it uses is to be trained."""
        return any(parameter.requires_grad for parameter in self.used(backbone, nn.Module.parameters))

    def adapts(self, backbone: nn.Module) -> bool:
        """Whether a layer of it has an adapter."""
        return any(has_adapters(backbone.get_submodule(name)) for name in self.modules)

    def freeze(self, backbone: nn.Module) -> None:
        """Leaves its parameters as they are: they get no gradient, and no optimizer takes them."""
        for parameter in self.used(backbone, nn.Module.parameters):
            parameter.requires_grad_(False)

    def rest(self, backbone: nn.Module) -> None:
        """Puts its batch norms into eval mode: they use the statistics that they have, and learn no others.

        Dropout and stochastic depth stay as they are. `train` on the backbone undoes it; on a `LocalNetwork` it does
        not.
        """
        for name in self.modules:
            for module in backbone.get_submodule(name).modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def __call__(
        self, backbone: nn.Module, features: Tensor, context: dict[str, Any], grad_checkpointing: bool = False
    ) -> Tensor:
        """Runs the unit.

        Args:
            backbone: the model whose modules and parameters it uses.
            features: output of the unit before it; the image for the first.
            context: what units hand along beside the one tensor: values through which no gradient flows (grid
                sizes, rotary tables, masks). Start with an empty dict for each batch.
            grad_checkpointing: keep no activations, but run the unit again in backward; also where timm's
                `set_grad_checkpointing` was called on the backbone.
        """
        code = self.code[backbone.training]
        arguments = (backbone, features, *(context[name] for name in code.reads))
        if backbone.training and torch.is_grad_enabled() and (grad_checkpointing or self._checkpoints(backbone)):
            output = checkpoint(code.function, *arguments, use_reentrant=False)
        else:
            output = code.function(*arguments)
        if code.writes:
            output, values = output
            context.update(zip(code.writes, values, strict=True))
        return output

    def _checkpoints(self, backbone: nn.Module) -> bool:
        return any(backbone.get_submodule(name).grad_checkpointing for name in self.switches)


@dataclass(frozen=True)
class Chain(Sequence[Unit]):
    """The units of a backbone, in the order in which data passes them.

    Attributes:
        units: the units.
        input_size: (channels, height, width) of the image the shapes hold for.
        prefix_tokens: class and register tokens in front of the others, where the backbone tells (else None).
        output_format: "NCHW" or "NHWC", where the backbone tells (else None).
        whole: why parts of the backbone are not cut inside though they hold blocks: a line for each, by the part's
            name; names in it are those within the part. With split blocks, also why blocks are not split.
    """

    units: tuple[Unit, ...]
    input_size: tuple[int, int, int]
    prefix_tokens: int | None = None
    output_format: str | None = None
    whole: dict[str, str] = field(default_factory=dict, hash=False)

    def __getitem__(self, index: Any) -> Any:
        return self.units[index]

    def __len__(self) -> int:
        return len(self.units)

    def __iter__(self) -> Iterator[Unit]:
        return iter(self.units)

    def __str__(self) -> str:
        width = max(len(unit.name) for unit in self.units)
        return "\n".join(f"{unit.name:{width}}  {' x '.join(map(str, unit.shape))}" for unit in self.units)

    def names(self) -> str:
        """The units' names in one line, for messages."""
        return ", ".join(unit.name for unit in self.units)

    def position(self, name: str) -> int:
        """Number of units up to and including the last one called `name` or lying below it ("layers.0").

        Raises:
            ChainError: no unit has that name.
        """
        ends = [i for i, u in enumerate(self.units, 1) if u.name == name or u.name.startswith(name + ".")]
        if not ends:
            paths = [u.name.split(".") for u in self.units]
            known = {".".join(path[:depth]) for path in paths for depth in range(1, len(path) + 1)}
            raise ChainError(f"no unit is called {name!r}; {suggestion(name, known)}")
        return ends[-1]
