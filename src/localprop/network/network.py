"""A backbone divided into gradient-isolated local modules, and the one place where gradients are cut."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from localprop.errors import ChainError, batch_norm_told
from localprop.features import Layout
from localprop.memory.recompute import recomputing
from localprop.network.carry import Carry
from localprop.seeding import derive_seed
from localprop.settings.recipe import Recipe
from localprop.tracing.units import Unit

Criterion = Callable[[Tensor, Tensor], Tensor]
"""(logits (B, C), labels: (B,) integers or (B, C) probabilities) -> a scalar loss."""


@dataclass(frozen=True)
class ModuleSpec:
    """What a local loss may know of the module it is built for.

    Attributes:
        index: which module, from 0.
        count: number of modules, K.
        input: layout of the module's input, the image's for the first.
        output: layout of the module's output.
        image: layout of the image batch.
        num_classes: number of labels.
        criterion: the loss of predicted labels.
        head: name of the auxiliary head.
        decoder: name of the decoder.
        mean, std: per channel, with which the images are normalised.
    """

    index: int
    count: int
    input: Layout
    output: Layout
    image: Layout
    num_classes: int
    criterion: Criterion
    head: str
    decoder: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def last(self) -> bool:
        """Whether this is the module with the backbone's own classifier."""
        return self.index == self.count - 1


class LocalLoss(nn.Module, ABC):
    """A module's local loss, with the auxiliary nets that it needs and inference does not.

    Attributes:
        uses_images: whether the loss looks at the images (other than as the input of the first module). Where no
            later module's does, they are freed.
    """

    uses_images: bool = True

    @abstractmethod
    def forward(
        self, output: Tensor, inputs: Tensor, images: Tensor | None, labels: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Computes the local loss.

        Args:
            output: the module's output; gradients flow back through it.
            inputs: the module's input, detached.
            images: the batch of images, normalised; None where `uses_images` is False.
            labels: (B,) integers, or (B, C) probabilities.

        Returns:
            The loss (a scalar), and the logits (B, C) of the head if there is one, else None.
        """

    @abstractmethod
    def classify(self, output: Tensor) -> Tensor | None:
        """The head's logits (B, C) for a module's output; None without a head that predicts labels."""


class Classification(LocalLoss):
    """The last module's loss under every method: the criterion on the backbone's own logits."""

    uses_images = False

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__()
        self.criterion = spec.criterion

    def forward(self, output: Tensor, inputs: Tensor, images: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See `LocalLoss.forward`; the output is the logits."""
        return self.criterion(output, labels), output

    def classify(self, output: Tensor) -> Tensor:
        """The output itself."""
        return output


class LocalModule(nn.Module):
    """Consecutive units of a backbone, trained by one local loss.

    Attributes:
        units: names of the units.
        auxiliary: the local loss with its auxiliary nets (an empty module in the last).
        output: layout of the module's output.
        recompute: whether cheap results are computed again in backward; see `localprop.memory.recompute`.
        grad_checkpointing: whether every unit but the last keeps no activations and runs again in backward. (What
            the last one keeps is needed at once, so nothing is gained by computing it twice.)
    """

    auxiliary: LocalLoss

    def __init__(
        self,
        backbone: nn.Module,
        units: Sequence[Unit],
        auxiliary: LocalLoss,
        output: Layout,
        recompute: bool = False,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        # In tuples, so that the backbone is not registered a second time: its state_dict keys stay its own.
        self._backbone = (backbone,)
        self._units = tuple(units)
        self.auxiliary = auxiliary
        self.output = output
        self.recompute = recompute
        self.grad_checkpointing = grad_checkpointing

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

    def forward(self, features: Tensor, context: dict[str, Any]) -> Tensor:
        """Runs the units; `context` is what they hand along beside the features (see `Unit`)."""
        return self.run_on(self._backbone[0], features, context)

    def run_on(self, backbone: nn.Module, features: Tensor, context: dict[str, Any]) -> Tensor:
        """Runs the units on another backbone of the same make, such as a moving average of this one."""
        *others, last = self._units
        for unit in others:
            features = unit(backbone, features, context, self.grad_checkpointing)
        return last(backbone, features, context)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the backbone exempts from weight decay; timm's optimizers ask for them."""
        exempt = getattr(self._backbone[0], "no_weight_decay", None)
        return set(exempt()) if exempt else set()

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """What this module trains: its share of the backbone, under the backbone's names, and the auxiliary net.

        Looked up at each call, so that adapters and parametrizations that were added since are among them.
        """
        prefix = f"{prefix}." if prefix else ""
        used = self._used(nn.Module.parameters)
        for name, parameter in self._backbone[0].named_parameters():
            if id(parameter) in used:
                yield prefix + name, parameter
        yield from self.auxiliary.named_parameters(f"{prefix}auxiliary", recurse, remove_duplicate)


@dataclass(frozen=True)
class LocalOutput:
    """What one `LocalNetwork.backward` computed.

    Attributes:
        losses: (K,) local losses, detached.
        module_logits: logits (B, C) of each module's head, detached; None where it has none.
    """

    losses: Tensor
    module_logits: list[Tensor | None]

    @property
    def logits(self) -> Tensor:
        """(B, C) logits of the network, detached."""
        logits = self.module_logits[-1]
        assert logits is not None  # the last module is the classifier
        return logits


class LocalNetwork(nn.Module):
    """A backbone and its local modules. Build it with `localprop.localize`.

    Attributes:
        backbone: the very model that was passed in.
        local_modules: its local modules, in order.
        input_size: (channels, height, width) of the images that it is made for, where that is known; others are
            refused.
        recipe: what it is made of, with every default filled in, where that is known.
    """

    local_modules: Sequence[LocalModule]

    def __init__(
        self,
        backbone: nn.Module,
        local_modules: Sequence[LocalModule],
        input_size: tuple[int, int, int] | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.input_size = input_size
        self.backbone = backbone
        self.local_modules = nn.ModuleList(local_modules)  # type: ignore[assignment]

    def forward(self, images: Tensor) -> Tensor:
        """The logits (B, C), as the backbone gives them, differentiable from end to end."""
        self._require_size(images)
        context: dict[str, Any] = {}
        features = images
        for module in self.local_modules:
            features = module(features, context)
        return features

    def module_logits(self, images: Tensor) -> list[Tensor | None]:
        """The logits (B, C) of every module's head (None where there is none); the last are the network's."""
        self._require_size(images)
        context: dict[str, Any] = {}
        features, logits = images, []
        for module in self.local_modules:
            features = module(features, context)
            logits.append(module.auxiliary.classify(features))
        return logits

    def backward(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        scaler: torch.amp.GradScaler | None = None,
        seed: int | None = None,
        after_module: Callable[[int, Tensor], None] | None = None,
        parts: int = 1,
    ) -> LocalOutput:
        """Forward and local backward, module by module; gradients are added to `.grad`.

        A module's graph is gone before the next module starts. Under `torch.autocast` the forward and the losses
        run in mixed precision, the backward outside of it, as PyTorch advises.

        Args:
            images: (B, channels, height, width). Freed after the last module that looks at them, if the caller
                keeps no reference.
            labels: (B,) integers, or (B, C) probabilities.
            scaler: scales each local loss before its backward (float16).
            seed: where given, module k draws its random numbers (dropout, stochastic depth) from a stream of its
                own, made from the seed and k. It sets PyTorch's global generators.
            after_module: called with k and the local loss (detached) as soon as module k's gradients are there:
                the place to step module k's optimizer and free its gradients, so that only one module's are alive.
            parts: how many such batches make one step; gradients are divided by that. Step after the last of them.
        """
        carry, logits = Carry(images, labels, images), []
        del images
        for k in range(len(self.local_modules)):
            logits.append(self.train_module(k, carry, scaler, seed, parts))
            if after_module:
                after_module(k, carry.losses[-1])
        return LocalOutput(torch.stack([loss.float() for loss in carry.losses]), logits)

    def train_module(
        self,
        k: int,
        carry: Carry,
        scaler: torch.amp.GradScaler | None = None,
        seed: int | None = None,
        parts: int = 1,
    ) -> Tensor | None:
        """Forward and local backward of module k alone; `carry` comes to it and is brought to the next module.

        A module whose share of the backbone is frozen only runs: its auxiliary net is not trained either.

        Args:
            k: the module.
            carry: the batch, behind module k-1.
            scaler: see `backward`.
            seed: likewise.
            parts: how many such batches make one step; gradients are divided by that.

        Returns:
            Logits (B, C) of the module's head, detached; None where it has none.

        Raises:
            ConfigError: batch norm is to train on a single value per channel.
        """
        module = self.local_modules[k]
        if k == 0:
            self._require_size(carry.features)
        if seed is not None:
            torch.manual_seed(derive_seed(seed, "module", k))
        if not any(later.auxiliary.uses_images for later in self.local_modules[k:]):
            carry.images = None
        frozen = module.frozen
        place = f"module {k + 1} of {len(self.local_modules)} ({module.units[0]} ... {module.units[-1]})"
        with batch_norm_told(place, len(carry.labels)), torch.no_grad() if frozen else recomputing(module.recompute):
            output = module(carry.features, carry.context)
            loss, logits = module.auxiliary(output, carry.features, carry.images, carry.labels)
        if loss.requires_grad:
            share = loss / parts if parts > 1 else loss
            _backward(scaler.scale(share) if scaler else share)
        carry.losses.append(loss.detach())
        # Gradient isolation. Everywhere: no other line cuts gradients, and nothing else crosses with one.
        carry.features = output.detach()
        return None if logits is None else logits.detach()

    def _require_size(self, images: Tensor) -> None:
        if self.input_size and images.shape[1:] != self.input_size:
            expected, found = ("x".join(map(str, size)) for size in (self.input_size, images.shape[1:]))
            raise ChainError(
                f"the network is made for images of {expected}, and these have {found}; resize them, or call localize "
                "with another input_size"
            )

    def shares(self) -> list[list[str]]:
        """The keys of the backbone's state dict, by the module that trains or changes them.

        A buffer that several modules use (a table) goes to the first of them, and so does all that none uses.
        """
        tensors = self.backbone.state_dict(keep_vars=True)
        owners: dict[int, int] = {}
        for k, module in enumerate(self.local_modules):
            own = [*module.named_parameters(), *((name, tensors.get(name)) for name in module.buffers_used)]
            for _, tensor in own:
                owners.setdefault(id(tensor), k)
        shares: list[list[str]] = [[] for _ in self.local_modules]
        for name, tensor in tensors.items():
            shares[owners.get(id(tensor), 0)].append(name)
        return shares

    def keep(self, modules: range, *copies: nn.Module) -> None:
        """Gives up the parameters of all other modules, which are trained elsewhere: they become meta tensors.

        Buffers stay: they are small, and several modules may look at the same.

        Args:
            modules: those that are kept.
            copies: of the backbone, which give up theirs too.
        """
        given_up = [name for k, share in enumerate(self.shares()) if k not in modules for name in share]
        for model in (self.backbone, *copies):
            _give_up(model, given_up)
        for k, module in enumerate(self.local_modules):
            if k not in modules:
                _give_up(module.auxiliary, [name for name, _ in module.auxiliary.named_parameters()])


def _give_up(model: nn.Module, names: list[str]) -> None:
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for name in names:
        place, _, leaf = name.rpartition(".")
        owner = model.get_submodule(place)
        parameter = getattr(owner, leaf)
        if isinstance(parameter, nn.Parameter):
            empty = torch.empty_like(parameter, device="meta")
            # Tied weights stay tied.
            setattr(owner, leaf, replaced.setdefault(parameter, nn.Parameter(empty, parameter.requires_grad)))


def _backward(loss: Tensor) -> None:
    device = loss.device.type
    if torch.is_autocast_enabled(device):
        torch.clear_autocast_cache()
        with torch.autocast(device, enabled=False):
            loss.backward()
        # Weights change right after this backward: casts of them that autocast has kept would be stale. Of units that
        # run again in backward there are some.
        torch.clear_autocast_cache()
    else:
        loss.backward()
