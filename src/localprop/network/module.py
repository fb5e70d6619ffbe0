"""Consecutive units of a backbone, trained by one local loss."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from localprop.features import Layout
from localprop.memory.recompute import keeping, keeping_nothing, recomputing
from localprop.memory.slices import run
from localprop.network.kinetic import kinetic_energy
from localprop.network.loss import HeadLoss, LocalLoss
from localprop.settings.recipe import Recomputation, runs_again
from localprop.tracing.units import Unit

Place = tuple[nn.Module, str, Tensor]
"""Of a buffer: the module that has it, its name there, and the buffer."""
BEFORE = "before."
"""Begins the names of what a module trains of the module before: the head that reads ahead."""
_HEAD = "head."


class LocalModule(nn.Module):
    """Consecutive units of a backbone, trained by one local loss.

    Attributes:
        units: names of the units.
        auxiliary: the local loss with its auxiliary nets; under this name its parameters are stored.
        output: layout of the module's output.
        recompute: whether cheap results are computed again in backward; see `localprop.memory.recompute`.
        grad_checkpointing: whether every unit but the last keeps no activations and runs again in backward. (What
            the last one keeps is needed at once, so nothing is gained by computing it twice.)
        recomputation: what each unit computes again in backward: "none", "cheap", "whole" or in slices of the batch
            ("whole/4"). Units that a head reads ahead are not run again: there are two backward passes through them.
        kinetic: weight of the kinetic energy of its blocks in its loss; see `localprop.network.kinetic`.
        resting: those of its units whose batch norms stay in eval mode; see `Unit.rest`.
        shared: how many of its first units the head of the module before reads ahead; that head is trained with this
            module.
        gives_head: whether its own head is trained with the next module.
        common: names of the buffers that other modules use, too, in exact training.
        begun: of these, in exact training, what they were before the first forward, until the second one.
    """

    auxiliary: LocalLoss

    def __init__(
        self,
        backbone: nn.Module,
        units: Sequence[Unit],
        local_loss: LocalLoss,
        output: Layout,
        recompute: bool = False,
        grad_checkpointing: bool = False,
        recomputation: Sequence[Recomputation] | None = None,
        kinetic: float = 0.0,
        resting: Sequence[Unit] = (),
    ) -> None:
        super().__init__()
        # In tuples, so that the backbone is not registered a second time: its state_dict keys stay its own.
        self._backbone = (backbone,)
        self._units = tuple(units)
        self.auxiliary = local_loss  # so are its parameters called, in checkpoints too
        self.output = output
        self.recompute = recompute
        self.grad_checkpointing = grad_checkpointing
        cheap: Recomputation = "cheap" if recompute else "none"
        inner: Recomputation = "whole" if grad_checkpointing else cheap
        self.recomputation = tuple(recomputation or [*[inner] * (len(self._units) - 1), cheap])
        self.kinetic = kinetic
        self._resting = tuple(resting)
        for unit in self._resting:
            unit.rest(backbone)
        self.shared, self.gives_head = 0, False
        self.common, self.begun = frozenset[str](), list[Tensor]()
        self._before: tuple[HeadLoss, ...] = ()

    def train(self, mode: bool = True) -> "LocalModule":
        """See `nn.Module.train`; batch norm of what is frozen stays as in evaluation."""
        super().train(mode)
        for unit in self._resting:
            unit.rest(self._backbone[0])
        return self

    def share(self, count: int, before: "LocalModule") -> None:
        """Lets the head of the module before read what the first `count` units make of its output."""
        assert isinstance(before.local_loss, HeadLoss)
        self.shared, before.gives_head = count, True
        self._before = (before.local_loss,)
        cheap: Recomputation = "cheap" if self.recompute else "none"
        own = self.recomputation
        self.recomputation = tuple(cheap if i < count and runs_again(r) else r for i, r in enumerate(own))

    def with_loss(self, local_loss: LocalLoss, recomputation: Sequence[Recomputation]) -> "LocalModule":
        """A module of the same units of the same backbone, with another local loss, and no head that reads ahead."""
        own = (self._backbone[0], self._units, local_loss, self.output, self.recompute, self.grad_checkpointing)
        return LocalModule(*own, recomputation, self.kinetic, self._resting)

    @property
    def local_loss(self) -> LocalLoss:
        """The local loss with its auxiliary nets."""
        return self.auxiliary

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the output, batch axis left out."""
        return self._units[-1].shape

    @property
    def own_units(self) -> tuple[Unit, ...]:
        """The units."""
        return self._units

    @property
    def units(self) -> list[str]:
        """Names of the units."""
        return [unit.name for unit in self._units]

    @property
    def buffers_used(self) -> list[str]:
        """Names of the backbone's buffers that the units use."""
        used = self._used(nn.Module.buffers)
        return [name for name, buffer in self._backbone[0].named_buffers() if id(buffer) in used]

    @property
    def frozen(self) -> bool:
        """Whether its share of the backbone has parameters, none of which is to be trained: then it only runs."""
        trained = None
        for parameter in self._each(nn.Module.parameters):
            trained = parameter.requires_grad
            if trained:
                break  # nearly always the first
        return trained is False

    def _each(self, members: Callable[[nn.Module], Iterable[Tensor]]) -> Iterator[Tensor]:
        return (tensor for unit in self._units for tensor in unit.used(self._backbone[0], members))

    def _used(self, members: Callable[[nn.Module], Iterable[Tensor]]) -> set[int]:
        return set(map(id, self._each(members)))

    @property
    def reads(self) -> set[str]:
        """Names of the context values that the units read."""
        return {name for unit in self._units for code in unit.code.values() for name in code.reads}

    def forward(
        self,
        features: Tensor,
        context: dict[str, Any],
        start: int = 0,
        stop: int | None = None,
        energies: list[Tensor] | None = None,
    ) -> Tensor:
        """Runs the units, or those from `start` to `stop`.

        Args:
            features: what the first of them takes.
            context: what units hand along beside the features; see `Unit`.
            start: number of the first unit.
            stop: number of the unit after the last; None for all.
            energies: to which the weighted kinetic energies are added, where `kinetic` is not 0.
        """
        return self.run_on(self._backbone[0], features, context, start, stop, energies)

    def run_on(
        self,
        backbone: nn.Module,
        features: Tensor,
        context: dict[str, Any],
        start: int = 0,
        stop: int | None = None,
        energies: list[Tensor] | None = None,
    ) -> Tensor:
        """Runs units on another backbone of the same make, such as a moving average of this one; see `forward`."""
        for unit, recomputation in zip(self._units[start:stop], self.recomputation[start:stop], strict=True):
            with self._remembering(recomputation):
                output = run(unit, backbone, features, context, recomputation)
                if self.kinetic and energies is not None and unit.depth and output.shape == features.shape:
                    energies.append(self.kinetic * kinetic_energy(output, features))
                features = output
                del output  # or it would live on beside what the next unit makes of it
        return features

    def boundary(self, features: Tensor, context: dict[str, Any]) -> Tensor:
        """Its output, of which autograd keeps nothing; whether a gradient comes there says `requires_grad`.

        Not under `torch.no_grad`, where some models take other kernels, and so round differently.

        Args:
            features: see `forward`.
            context: likewise.
        """
        with keeping_nothing():
            if self._compiled_call_impl is not None:  # other code would round differently
                output: Tensor = self(features, context, 0, None, [])
                return output.detach().requires_grad_(output.requires_grad)
            for unit, recomputation in zip(self._units, self.recomputation, strict=True):
                # What would run again does not, for there is no backward; but slices draw numbers of their own.
                same = recomputation if runs_again(recomputation) > 1 else "none"
                output = run(unit, self._backbone[0], features, context, same)
                features = output.detach().requires_grad_(output.requires_grad)
                del output
        return features

    @property
    def trains(self) -> bool:
        """Whether any parameter of its share of the backbone is to be trained."""
        return any(parameter.requires_grad for parameter in self._each(nn.Module.parameters))

    def buffer_places(self) -> tuple[list[Place], list[Place]]:
        """The places of the backbone's buffers that the units use: of those that others use, too, and of the rest."""
        used, backbone = self._used(nn.Module.buffers), self._backbone[0]
        common = {id(backbone.get_buffer(name)) for name in self.common}
        held = ((own, name, buffer) for own in backbone.modules() for name, buffer in own._buffers.items())
        places = [(own, name, buffer) for own, name, buffer in held if buffer is not None and id(buffer) in used]
        return [own for own in places if id(own[2]) in common], [own for own in places if id(own[2]) not in common]

    def trained(self) -> list[Tensor]:
        """The parameters of its units and of its local loss that are to be trained."""
        own = [*self._each(nn.Module.parameters), *self.auxiliary.parameters()]
        return [parameter for parameter in dict.fromkeys(own) if parameter.requires_grad]

    def _remembering(self, recomputation: Recomputation) -> AbstractContextManager[None]:
        """What autograd keeps of a unit; all units and the local loss run inside `recomputing(self.recompute)`."""
        if recomputation == "none" and self.recompute:
            return keeping()
        return recomputing() if recomputation == "cheap" and not self.recompute else nullcontext()

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the backbone exempts from weight decay; timm's optimizers ask for them.

        A head's copies of these are exempt, too.
        """
        exempt = getattr(self._backbone[0], "no_weight_decay", None)
        names = set(exempt()) if exempt else set()
        nets = [("auxiliary.", self.auxiliary), *((BEFORE, before) for before in self._before)]
        own = [prefix + name for prefix, net in nets for name, _ in net.named_parameters() if names]
        return names | {name for name in own if any(name.endswith(f".{other}") for other in names)}

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """What this module trains: its share of the backbone, under the backbone's names, and auxiliary nets.

        A head that reads ahead belongs to the module whose units it reads. All are looked up at each call, so that
        adapters and parametrizations that were added since are among them.
        """
        prefix = f"{prefix}." if prefix else ""
        used = self._used(nn.Module.parameters)
        for name, parameter in self._backbone[0].named_parameters():
            if id(parameter) in used:
                yield prefix + name, parameter
        for name, parameter in self.auxiliary.named_parameters("", recurse, remove_duplicate):
            if not (self.gives_head and name.startswith(_HEAD)):
                yield f"{prefix}auxiliary.{name}", parameter
        for before in self._before:
            for name, parameter in before.named_parameters("", recurse, remove_duplicate):
                if name.startswith(_HEAD):
                    yield f"{prefix}{BEFORE}{name}", parameter

    def auxiliary_state(self) -> dict[str, Tensor]:
        """The tensors of the auxiliary nets that this module trains, by name."""
        own = self._own_state()
        for before in self._before:
            own |= {f"{BEFORE}{name}": tensor for name, tensor in before.state_dict().items() if name.startswith(_HEAD)}
        return own

    def load_auxiliary_state(self, state: dict[str, Tensor]) -> None:
        """Loads what `auxiliary_state` gave; raises ValueError if it is another module's."""
        if other := state.keys() ^ self.auxiliary_state().keys():
            raise ValueError(f"its auxiliary nets hold other weights, such as {min(other)}")
        own = self._own_state()
        self.auxiliary.load_state_dict({name: state[name] for name in own}, strict=False)
        for before in self._before:
            # What is not its own, because a net of a plugin's loss may be called `before` as well.
            taken = {name[len(BEFORE) :]: tensor for name, tensor in state.items() if name not in own}
            before.load_state_dict(taken, strict=False)

    def _own_state(self) -> dict[str, Tensor]:
        """The tensors of its own local loss that it trains."""
        state = self.auxiliary.state_dict()
        return {name: tensor for name, tensor in state.items() if not (self.gives_head and name.startswith(_HEAD))}
