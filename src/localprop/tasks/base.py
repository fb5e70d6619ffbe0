"""What a network is trained for. Methods, network, planning, training and reports know no more of it than this."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from localprop.errors import ConfigError
from localprop.features import Example, Layout
from localprop.registry import TASKS
from localprop.report.measures import Measure
from localprop.settings.config import DataConfig

Batch = list[Tensor]
"""[inputs, targets], each with the batch axis first. Who takes the tensors empties the list, so that they can be freed
while the batch is trained on."""


class Task(nn.Module, ABC):
    """What a network is trained for: its loss, what a module's head predicts, and how predictions are scored.

    A prediction is the network's output, or that of a module's head. Shapes of one prediction leave the batch axis out.
    It is an `nn.Module`, so that tensors of a loss, such as weights of classes, are on the network's device.

    Attributes:
        unit: what one example is called, such as "image"; a noun whose plural ends in s.
        measures: what `scores` gives; the first is the headline, which is shown for every module.
        outputs: size of the model's last layer, where the task decides it; None leaves it to the model.
        names_outputs: whether each output stands for a class of the data, in their order: exports name them then.
    """

    unit: str = "image"
    measures: Sequence[Measure]
    outputs: int | None = None
    names_outputs: bool = False

    @classmethod
    def of(cls, settings: DataConfig, classes: list[str]) -> "Task":
        """The task of a run.

        Args:
            settings: the run's data settings.
            classes: names of the data's classes, in the order of their labels.

        Raises:
            ConfigError: the settings ask for what the task does not do, such as mixing images.
        """
        if settings.mixup or settings.cutmix:
            raise ConfigError(f"the task {settings.task!r} mixes no images; leave out --mixup and --cutmix")
        return cls()

    @property
    def hard_labels(self) -> bool:
        """Whether the target of each example is one integer label, as supervised contrast needs it."""
        return False

    def check_prediction(self, prediction: tuple[int, ...], outputs: int | None) -> None:
        """Raises a ChainError where a network's prediction has not the shape that the task needs.

        Args:
            prediction: shape of the network's output, batch axis left out.
            outputs: size of its last axis, where that is known.
        """

    def check(self, batch_size: int) -> None:
        """Raises a ConfigError where batches of this size cannot be prepared."""

    def prepare(self, batch: Batch, seed: int, training: bool) -> Batch:
        """Makes a batch of the data into one to train or evaluate on: masking, mixing, the next token as target.

        It is a pure function of its arguments. It may change the tensors, which are on the training device.

        Args:
            batch: what the data give.
            seed: of its random numbers.
            training: whether it is trained on.
        """
        return batch

    @abstractmethod
    def target(self, prediction: tuple[int, ...]) -> Example:
        """What the target of one prediction of this shape looks like."""

    @abstractmethod
    def loss(self, prediction: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch, a scalar: the mean over what `weight` counts."""

    def weight(self, targets: Tensor) -> Tensor | None:
        """What the loss is a mean over, a scalar: the number of targets that are not ignored.

        Micro-batches and replicas have their share in a step by it. None stands for the number of examples.
        """
        return None

    @abstractmethod
    def head(self, name: str, features: Layout, prediction: tuple[int, ...]) -> nn.Module:
        """A head for a module inside the network.

        Args:
            name: which head, as the user chose it.
            features: layout of the features that it reads.
            prediction: shape of the prediction that it gives, as the network's own.

        Raises:
            ConfigError: there is no head of that name.
        """

    @abstractmethod
    def sums(self, prediction: Tensor, targets: Tensor) -> Tensor:
        """(n,) float64 numbers of a batch, to be added up over batches and processes, from which `scores` follow."""

    @abstractmethod
    def scores(self, sums: Tensor) -> list[float | None]:
        """The score of each of `measures`, from added up `sums`; None where it has no meaning."""

    def for_costs(self) -> "Task":
        """The task whose loss takes the targets that `target` describes: memory and time are predicted with it."""
        return self


def task_of(settings: DataConfig, classes: list[str]) -> Task:
    """What a network is trained for on data with these classes.

    Raises:
        ConfigError: there is no such task, what a plugin has registered is none, or it does not do what is asked for.
    """
    kind = TASKS.lookup(settings.task)
    if not (isinstance(kind, type) and issubclass(kind, Task)):
        raise ConfigError(f"task {settings.task!r} is a {type(kind).__name__}; register a subclass of localprop.Task")
    return kind.of(settings, classes)


def share_of_step(task: Task, total: Tensor | None, parts: int, targets: Tensor) -> Tensor | None:
    """How much more than an equal part the loss of one part of a step's batch counts in the mean over the batch.

    Args:
        task: what is trained for.
        total: its `weight` of the whole batch's targets.
        parts: into how many equal parts the batch is divided, micro-batches and replicas together.
        targets: those of the part.

    Returns:
        A scalar; None where it is 1, because the mean is over examples.
    """
    own = task.weight(targets)
    if own is None or total is None:
        return None
    # A batch whose targets are all ignored has no loss, and no gradient.
    return own * parts / total.clamp(min=torch.finfo(torch.float32).tiny)
