"""A backbone divided into gradient-isolated local modules."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from localprop.errors import ChainError, ConfigError, warn_renamed
from localprop.network.capture import CapturedBackward
from localprop.network.carry import Carry
from localprop.network.exact import is_exact, knowing_common_buffers
from localprop.network.graphs import CudaGraphPool
from localprop.network.loss import NoLoss
from localprop.network.module import LocalModule
from localprop.network.output import LocalOutput
from localprop.network.owners import give_up, shares_of
from localprop.network.phase import Phase, Scaling
from localprop.network.turns import run_phase, turn, turns
from localprop.seeding import derive_seed, drawn_seed
from localprop.settings.recipe import Recipe
from localprop.tasks.base import Task
from localprop.tasks.classification import Classification


class LocalNetwork(nn.Module):
    """A backbone and its local modules. Build it with `localprop.localize`.

    Attributes:
        backbone: the very model that was passed in.
        local_modules: its local modules, in order.
        input_size: shape of one input that it is made for, (channels, height, width) of an image, where that is known;
            others are refused.
        recipe: what it is made of, with every default filled in, where that is known.
    """

    local_modules: Sequence[LocalModule]

    def __init__(
        self,
        backbone: nn.Module,
        local_modules: Sequence[LocalModule],
        input_size: tuple[int, int, int] | None = None,
        recipe: Recipe | None = None,
        task: Task | None = None,
    ) -> None:
        super().__init__()
        self.recipe = recipe
        # In a tuple: local losses have it, and a second name of its tensors would change the keys of the state dict.
        self._task = (task or Classification(),)
        self.input_size = input_size
        self.backbone = backbone
        self.local_modules = nn.ModuleList(knowing_common_buffers(local_modules))  # type: ignore[assignment]
        self.register_load_state_dict_pre_hook(_name_criteria)

    @property
    def task(self) -> Task:
        """What the network is trained for."""
        return self._task[0]

    @property
    def exact(self) -> bool:
        """Whether its modules are trained exactly: with the gradients of end-to-end training."""
        return is_exact(self.local_modules)

    @property
    def loss_count(self) -> int:
        """How many losses and predictions it has: one for each module; in exact training the network's alone."""
        return 1 if self.exact else len(self.local_modules)

    @property
    def prediction_shape(self) -> tuple[int, ...]:
        """Shape of the output, batch axis left out."""
        return self.local_modules[-1].output_shape

    def forward(self, inputs: Tensor) -> Tensor:
        """The prediction (B, ...), as the backbone gives it, differentiable from end to end."""
        self._require_size(inputs)
        context: dict[str, Any] = {}
        features = inputs
        for module in self.local_modules:
            features = module(features, context)
        return features

    def module_predictions(self, inputs: Tensor) -> list[Tensor | None]:
        """The prediction of every module's head (None without one), the network's last; if exact, that alone."""
        self._require_size(inputs)
        context: dict[str, Any] = {}
        features, predictions = inputs, []
        for k in range(len(self.local_modules)):
            features, own = self.predict_module(k, features, context)
            predictions += own
        return predictions

    def module_logits(self, images: Tensor) -> list[Tensor | None]:
        """Name of `module_predictions` in version 0.1."""
        warn_renamed("LocalNetwork.module_logits", "LocalNetwork.module_predictions")
        return self.module_predictions(images)

    def backward(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        scaler: torch.amp.GradScaler | None = None,
        seed: int | None = None,
        after_module: Callable[[int, Tensor], None] | None = None,
        parts: int = 1,
    ) -> LocalOutput:
        """Forward and local backward, module by module; gradients are added to `.grad`.

        A module's graph is gone before the next module starts. In exact training all modules run, and then the last one
        is the first to have its gradients; see `localprop.network.exact`. Under `torch.autocast` the forward and the
        losses run in mixed precision, the backward outside of it, as PyTorch advises.

        Args:
            inputs: (B, ...), such as images (B, channels, height, width). Freed after the last module that looks at
                them, if the caller keeps no reference.
            targets: as the task has them; of classification (B,) integers, or (B, C) probabilities.
            scaler: scales each local loss before its backward (float16).
            seed: where given, module k draws its random numbers (dropout, stochastic depth) from a stream of its
                own, made from the seed and k. It sets PyTorch's global generators. Exact training, which needs the same
                numbers twice, draws a seed where none is given, and leaves the CPU's generator where that draw did.
            after_module: called with k and the local loss (detached) as soon as module k's gradients are there:
                the place to step module k's optimizer and free its gradients, so that only one module's are alive. In
                exact training k goes from the last module to the first, and the loss is the network's.
            parts: how many such batches make one step; gradients are divided by that. Step after the last of them.
        """
        carry = Carry(inputs, targets, inputs)
        predictions: list[Tensor | None] = [None] * self.loss_count
        del inputs
        with self.seed_of_batch(seed) as own:
            for phase in self.phases:
                if own is not None:
                    self.seed_phase(phase, own)
                self.note_prediction(predictions, phase, self.run_phase(phase, carry, scaler, parts))
                if after_module and phase.done:
                    after_module(phase.module, carry.losses[-1])
        return LocalOutput(torch.stack([loss.float() for loss in carry.losses]), predictions)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of a batch, in order."""
        return turns(self.local_modules, range(len(self.local_modules)))

    def seed_of_batch(self, seed: int | None) -> AbstractContextManager[int | None]:
        """The seed of a batch that runs inside, from what is given for it; see `backward`."""
        return drawn_seed() if seed is None and self.exact else nullcontext(seed)

    def note_prediction(self, predictions: list[Tensor | None], phase: Phase, prediction: Tensor | None) -> None:
        """Puts what a phase has predicted into the list of all predictions, if it may stay."""
        place = phase.module - len(self.local_modules)  # counted from the end
        # K predictions of a vector each are small; K of a vocabulary at every position are not.
        if prediction is not None and (prediction.dim() == 2 or place == -1):
            predictions[place] = prediction

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
            carry: the batch, after module k-1.
            scaler: see `backward`.
            seed: likewise.
            parts: how many such batches make one step; gradients are divided by that.

        Returns:
            The prediction of the module's head, detached; None where it has none.

        Raises:
            ConfigError: batch norm is to train on a single value per channel, or the training is exact.
        """
        if self.exact:
            raise ConfigError("in exact training a module's gradient comes from the next one; call backward")
        prediction = None
        for phase in self.turn(k):
            if seed is not None:
                self.seed_phase(phase, seed)
            prediction = prediction if (own := self.run_phase(phase, carry, scaler, parts)) is None else own
        return prediction

    def turn(self, k: int) -> tuple[Phase, ...]:
        """The parts of the training of module k on a batch, in order; see `Phase`."""
        return turn(self.local_modules, k)

    def run_phase(
        self, phase: Phase, carry: Carry, scaler: torch.amp.GradScaler | None = None, parts: int = 1
    ) -> Tensor | None:
        """Runs one phase of a turn. In the phase "ahead", `scaler` is that of the next module, which trains the head.

        Arguments, result and errors are else those of `train_module`.
        """
        if phase.module == 0 and phase.kind in ("whole", "forward", "first"):
            self._require_size(carry.features)
        return run_phase(self.local_modules, phase, carry, Scaling(scaler, parts))

    def seed_phase(self, phase: Phase, seed: int) -> None:
        """Sets PyTorch's global generators to the stream of a phase, for a batch whose seed is `seed`."""
        torch.manual_seed(derive_seed(seed, phase.purpose, phase.module))

    def predict_module(self, k: int, features: Tensor, context: dict[str, Any]) -> tuple[Tensor, list[Tensor | None]]:
        """Runs module k in an evaluation.

        Args:
            k: the module.
            features: the output of the module before, or the inputs.
            context: what units hand along beside them.

        Returns:
            Its output, and the predictions of the heads that have what they read by then: that of the module before, if
            it reads ahead, and the module's own, if it does not; None for a module that has no head.
        """
        module, predictions = self.local_modules[k], list[Tensor | None]()
        if module.shared:
            features = module(features, context, 0, module.shared)
            predictions.append(self.local_modules[k - 1].local_loss.predict(features))
        features = module(features, context, module.shared)
        if not (module.gives_head or isinstance(module.local_loss, NoLoss)):
            predictions.append(module.local_loss.predict(features))
        return features, predictions

    def capture(
        self,
        *,
        after_module: Callable[[int, Tensor], None] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> CapturedBackward:
        """`backward` as CUDA graphs, one for each module. Call the result in its place, under the same autocast.

        The first call runs eagerly, as a warm-up. The second is captured and replayed, and later ones are replayed:
        without Python, and with few launches. `after_module` is captured too. All that it and the losses do must stay
        on the device: an optimizer needs `capturable=True`, and a tensor there as its learning rate.

        Args:
            after_module: see `backward`; the place to step module k's optimizer and set its gradients to None.
            scaler: see `backward`.

        Raises:
            ConfigError: the network is not on a CUDA device.
        """
        device = next(self.parameters()).device
        if device.type != "cuda":
            raise ConfigError(f"CUDA graphs need CUDA, and the network is on {device}; call backward there")
        return CapturedBackward(self, CudaGraphPool(device), after_module, scaler)

    def _require_size(self, inputs: Tensor) -> None:
        if self.input_size and inputs.shape[1:] != self.input_size:
            expected, found = ("x".join(map(str, size)) for size in (self.input_size, inputs.shape[1:]))
            raise ChainError(
                f"the network is made for {self.task.unit}s of {expected}, and these have {found}; resize them, or "
                "call localize with another input_size"
            )

    def shares(self) -> list[list[str]]:
        """The keys of the backbone's state dict, by the module that trains or changes them.

        A buffer that several modules use (a table) goes to the first of them, and so does all that none uses.
        """
        return shares_of(self.backbone, self.local_modules)

    def keep(self, modules: range, *copies: nn.Module) -> None:
        """Gives up the parameters of all other modules, which are trained elsewhere: they become meta tensors.

        Buffers stay: they are small, and several modules may look at the same.

        Args:
            modules: those that are kept.
            copies: of the backbone, which give up theirs too.
        """
        given_up = [name for k, share in enumerate(self.shares()) if k not in modules for name in share]
        for model in (self.backbone, *copies):
            give_up(model, given_up)
        kept = {id(parameter) for k in modules for parameter in self.local_modules[k].parameters()}
        for module in self.local_modules:
            loss = module.local_loss
            give_up(loss, [name for name, parameter in loss.named_parameters() if id(parameter) not in kept])


def _name_criteria(net: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Renames the tensors of a criterion in a state dict of version 0.1, in which local losses had it themselves."""
    known = {prefix + name for name in net.state_dict()}
    for name in [name for name in state if name not in known]:
        new = name.replace(".auxiliary.criterion.", ".auxiliary.task.criterion.", 1)
        if new in known:
            state.setdefault(new, state.pop(name))
