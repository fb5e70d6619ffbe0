"""Processes that exchange gradients in a step, without processes: threads of which one computes at a time."""

import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from localprop.errors import ConfigError, NonFiniteLossError
from localprop.network.carry import Carry
from localprop.settings.config import OptimConfig, RunConfig
from localprop.training.state import TrainingState, autocast
from localprop.training.stepping.captured import use_graphs
from tiny import batch, split

CPU = torch.device("cpu")
STEPS = 3


class Neighbour:
    """A process between two others; `computing` is held by the thread that computes."""

    def __init__(self, computing):
        self.computing = computing
        self.came, self.back = queue.Queue(), queue.Queue()
        self.before = self.after = None

    def wait(self, source):
        self.computing.release()
        try:
            return source.get(timeout=120)
        finally:
            self.computing.acquire()

    def give_back(self, carry):
        self.before.back.put((carry.gradient, carry.scale, carry.losses[-1]))
        carry.gradient = carry.scale = None

    def hand_on(self, carry):
        sent = replace(carry.clone(), context=dict(carry.context), losses=list(carry.losses), inputs=None, pending=None)
        self.after.came.put(sent)
        carry.gradient, carry.scale, carry.losses[-1] = self.wait(self.back)

    def settle(self):
        pass


def train_apart(net_of, config, stages, delayed, looks):
    """Trains stages in threads; gives what a checkpoint would have, and the last one's losses of each micro-batch."""
    computing = threading.Lock()
    places = [Neighbour(computing) for _ in stages]
    for a, b in pairwise(places):
        a.after, b.before = b, a
    torch.manual_seed(7)
    states = [
        TrainingState(net_of().train(), config, 10, CPU, modules, exchange=place, delayed=delayed)
        for modules, place in zip(stages, places, strict=True)
    ]
    for state in states:
        for k, scaler in zip(state.modules, state.scalers, strict=True):
            if scaler:
                scaler._init_scale = 2.0 ** (6 + 3 * k)  # what comes back has another one's scale

    def run(rank):
        losses = []
        with computing:
            for step in range(STEPS):
                for part in range(config.micro_batches):
                    images, labels = batch(seed=10 * step + part)
                    carry = Carry.of([images, labels]) if rank == 0 else places[rank].wait(places[rank].came)
                    carry.inputs = images if looks else None
                    with autocast(config, CPU):
                        losses.append(states[rank].train_step(carry, 5 * step + part, part + 1 == config.micro_batches))
        return losses

    with ThreadPoolExecutor(len(stages)) as pool:
        runs = [pool.submit(run, rank) for rank in range(len(stages))]
        losses = [own.result(timeout=300) for own in runs]
    return {name: part for state in states for name, part in state.parts().items()}, losses


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


LIVELY = {"micro_batches": 2, "clip_grad": 0.5, "model_ema": True, "model_ema_decay": 0.9}


@pytest.mark.parametrize(
    ("name", "method", "reach", "settings", "delayed"),
    [
        ("vit", "feature-reconstruction", 1, LIVELY, False),
        ("vit", "greedy", 2, {"amp": True, "amp_dtype": "bfloat16", **LIVELY}, True),
        ("swin", "infopro", 1, {"amp": True, "amp_dtype": "float16"}, False),
        ("resnet", "feature-reconstruction", 9, {"amp": True, "amp_dtype": "float16", "micro_batches": 2}, False),
    ],
)
@pytest.mark.parametrize("stages", [(range(1), range(1, 3)), (range(1), range(1, 2), range(2, 3))])
def test_stages_that_exchange_gradients_have_the_bits_of_one(name, method, reach, settings, delayed, stages):
    config = OptimConfig(**settings)

    def net_of():
        return split(name, 3, method, reach=reach, kinetic=0.1)

    parts, losses = train_apart(net_of, config, stages, delayed, looks=method == "infopro")
    whole, whole_losses = train_apart(net_of, config, (range(3),), delayed, looks=method == "infopro")
    assert len(parts) == 3
    for own in whole:
        assert same(parts[own], whole[own]), own
    for rank, modules in enumerate(stages):  # each process knows all of the losses of its own modules
        for a, b in zip(losses[rank], whole_losses[0], strict=True):
            assert torch.equal(a, b[: modules.stop])


def test_a_head_whose_loss_is_not_finite_ends_the_process_that_trains_it():
    net = split("mlp", 3, "greedy", reach=1)
    images, labels = batch()
    features = net.local_modules[0](images, {}).detach()
    state = TrainingState(net.train(), OptimConfig(), 10, CPU, range(1, 3), exchange=Neighbour(threading.Lock()))
    before = [p.detach().clone() for k in (1, 2) for p in net.local_modules[k].parameters()]
    carry = Carry(features * float("nan"), labels, losses=[torch.zeros(())])
    with pytest.raises(NonFiniteLossError, match=r"the loss of module 1 of 3 \(.*\) is nan at step 1"):
        state.train_step(carry, 0)
    after = [p for k in (1, 2) for p in net.local_modules[k].parameters()]
    assert all(map(torch.equal, before, after))
    assert all(p.grad is None for p in after)


def test_steps_that_exchange_gradients_are_no_cuda_graphs():
    net = split("mlp", 3, "greedy", reach=1)
    state = TrainingState(net, OptimConfig(), 10, CPU, range(1), exchange=Neighbour(threading.Lock()))
    notes = []
    use_graphs(state, RunConfig(), torch.device("cuda"), False, notes.append)
    (line,) = notes
    assert line.startswith("no CUDA graphs: a head reads ahead into another process")
    assert state.captured is None
    with pytest.raises(ConfigError, match="--cuda-graphs on: a head reads ahead into another process"):
        use_graphs(state, RunConfig(cuda_graphs="on"), torch.device("cuda"), False, notes.append)
