"""The head that resembles what follows: private copies of later blocks, up to the network's own classifier.

Source: Ma et al., Scaling Supervised Local Learning with Augmented Auxiliary Networks (AugLocal), ICLR 2024. A module
whose loss is computed by layers like those that follow learns features that these can use.
"""

import math

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from localprop.errors import ChainError, ConfigError, first_line
from localprop.features import Layout
from localprop.heads.common import Place
from localprop.registry import HEADS
from localprop.tracing.copies import fake_copy
from localprop.tracing.private import PrivateChain, is_trained, writers


class SuccessorHead(PrivateChain):
    """Copies of some later blocks, of the units between that change the shape, and of the classifier.

    Of the n blocks that follow, d are picked evenly, the last among them: number round(n/d i) for i = 1 ... d. d falls
    with depth, as in the source: d_i = max(1, round((1 - r) depth + r)), r = tau i / (K - 2) for module i from 0.

    Args:
        layout: of the features that it reads.
        num_outputs: how many numbers it gives for each example, by norm, pool and a linear layer; None for the
            network's own prediction, by the structure of its classifier.
        place: where it stands.
        depth: blocks that are picked in the first module.
        tau: how much fewer the last heads have, from 0 (as many) to 1 (one).
        copy: whether weights begin as the backbone's are; default: where that has been trained before.

    Raises:
        ConfigError: an impossible option, or a backbone whose units do not run by themselves.
    """

    needs_place = True

    def __init__(
        self,
        layout: Layout,
        num_outputs: int | None,
        place: Place,
        depth: int = 2,
        tau: float = 0.5,
        copy: bool | None = None,
    ) -> None:
        if depth < 1:
            raise ConfigError(f"head successor: depth is {depth}; it must be at least 1")
        if not 0 <= tau <= 1:
            raise ConfigError(f"head successor: tau is {tau:g}; it must be between 0 and 1")
        if not isinstance(copy, bool | None):
            raise ConfigError(f"head successor: copy is {copy!r}; it is True or False")
        place_name = place.units[place.position - 1].name
        classifier = len(place.units) - 1
        chosen = _chosen(place, depth_at(depth, tau, place.index, place.count))
        if num_outputs is None:
            chosen.add(classifier)
        copied = is_trained(place.model) if copy is None else copy
        try:
            order = sorted(writers(place.units, chosen, place.position))
            super().__init__(
                place.model, place.units, place.position, order, place.weights or ("copied" if copied else "new")
            )
        except (ChainError, AttributeError) as error:
            raise _refusal(place_name, error) from None
        self._place_name = place_name
        self.projection = None
        if num_outputs is not None:
            self.projection = HEADS["linear"](place.layouts[classifier], num_outputs)
        if place.weights is None:
            self._try(place, (num_outputs,) if num_outputs is not None else place.units[-1].shape)

    def forward(self, features: Tensor) -> Tensor:
        """Maps features in their own layout to (batch, num_outputs), or to the network's prediction."""
        features = super().forward(features)
        return features if self.projection is None else self.projection(features)

    def _try(self, place: Place, expected: tuple[int, ...]) -> None:
        """Runs a copy on fake tensors, in both modes."""
        dtype = next((p.dtype for p in place.model.parameters() if p.is_floating_point()), torch.float32)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        try:
            duplicate = fake_copy(self, mode)
            for training in (True, False):
                with mode, torch.no_grad():
                    output = duplicate.train(training)(torch.empty(2, *_shape(place), dtype=dtype))
                if output.shape != (2, *expected):
                    raise ChainError(f"it gives {tuple(output.shape[1:])} and not {expected}")
        except Exception as error:  # a model's own code may raise anything
            raise _refusal(self._place_name, error) from error


def _refusal(place: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"head successor cannot be built behind unit {place} ({first_line(error)[:150]}); choose another head"
    )


def depth_at(depth: int, tau: float, index: int, count: int) -> int:
    """How many blocks are picked for the head of module `index` of `count`; see `SuccessorHead`."""
    ratio = tau * index / (count - 2) if count > 2 else 0.0
    return max(1, _round(depth * (1 - ratio) + ratio))


def picked(blocks: int, depth: int) -> set[int]:
    """Which of the blocks that follow are picked, from 0: as many as `depth`, or all, evenly, the last among them."""
    depth = min(depth, blocks)
    return {_round(blocks * i / depth) - 1 for i in range(1, depth + 1)}


def _chosen(place: Place, depth: int) -> set[int]:
    """The units before the classifier that are copied: blocks that are picked, and what changes the shape."""
    following = range(place.position, len(place.units) - 1)
    blocks = [i for i in following if place.units[i].depth]
    changing = {i for i in following if place.units[i].shape != place.units[i - 1].shape}
    return {blocks[i] for i in picked(len(blocks), depth)} | changing


def _shape(place: Place) -> tuple[int, ...]:
    return place.units[place.position - 1].shape


def _round(value: float) -> int:
    return math.floor(value + 0.5)
