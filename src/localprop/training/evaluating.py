"""Evaluates a network while it trains: every module's head, and the network or its moving average."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn

from localprop.data.base import Data
from localprop.network.carry import Carry
from localprop.settings.config import TrainConfig
from localprop.training.scores import Scores, Tally, sums_of
from localprop.training.stage import Stage
from localprop.training.state import TrainingState, autocast


def evaluate_network(
    state: TrainingState,
    stage: Stage,
    data: Data,
    config: TrainConfig,
    device: torch.device,
    stop_if_asked: Callable[[int], None],
) -> Scores | None:
    """Evaluates a network on the test images of a dataset.

    Args:
        state: the network, and its moving average where there is one.
        stage: which modules are run in this process.
        data: whose test images are taken.
        config: the run's settings.
        device: where the network is.
        stop_if_asked: is called after each batch, with its `Carry.stop`.

    Returns:
        What was found; None in a process that does not report.
    """
    net, optim = state.net, config.optim
    averaged = state.ema.module.eval() if state.ema else None
    tally = Tally(net.task)
    net.eval()
    at_once = optim.batch_size // optim.micro_batches // stage.replicas
    batches = stage.test_batches(data, at_once, device, 1 if averaged is None else 2)
    # Compiled code would be compiled again for evaluation, and once more for its last, smaller batch.
    with torch.compiler.set_stance("force_eager") if config.run.compile else nullcontext(), torch.no_grad():
        for carries in batches:
            for carry, model in zip(carries, (None, averaged), strict=False):
                with autocast(optim, device):
                    _run(state, stage.modules, carry, model)
                stage.send(carry)
            if stage.reports:
                final = carries[-1]
                sums = net.task.sums(final.features, final.targets)
                tally.add([*carries[0].sums[:-1], sums], len(final.targets))
            stop_if_asked(carries[-1].stop)
    net.train()
    return tally.scores() if stage.reports else None


def _run(state: TrainingState, modules: range, carry: Carry, averaged: nn.Module | None) -> None:
    """Runs some modules and their heads, or, without heads, those of a moving average."""
    for k in modules:
        module = state.net.local_modules[k]
        if averaged is None:
            carry.features, predictions = state.net.predict_module(k, carry.features, carry.context)
            carry.sums += [sums_of(state.net.task, own, carry.targets) for own in predictions]
        else:
            carry.features = module.run_on(averaged, carry.features, carry.context)
