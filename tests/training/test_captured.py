"""A step that is captured and replayed gives the bits of an eager step, and never waits for the device."""

import pytest
import torch

from localprop.errors import NonFiniteLossError
from localprop.network.carry import Carry
from localprop.parallel.placement import IN_FLIGHT
from localprop.settings.config import OptimConfig, RunConfig
from localprop.training.state import TrainingState
from localprop.training.stepping import captured
from localprop.training.stepping.steps import forget
from tape import Reads, TapePool
from tiny import batch, split

CPU = torch.device("cpu")
SETTINGS = {
    "plain": {},
    "bfloat16": {"amp": True},
    "float16": {"amp": True, "amp_dtype": "float16"},
    "clipped": {"clip_grad": 0.05},
    "averaged": {"model_ema": True, "model_ema_decay": 0.9},
    "micro-batches": {"micro_batches": 3, "clip_grad": 1.0},
    "micro-batches, float16": {"micro_batches": 2, "amp": True, "amp_dtype": "float16"},
    "sgd": {"opt": "momentum", "lr": 0.01},
    "checked by the host": {"opt": "lamb", "model_ema": True},
    "checked by the host, micro-batches": {"opt": "lamb", "micro_batches": 2, "clip_grad": 1.0},
}


def state_of(kind="swin", method="feature-reconstruction", modules=None, reach=0, kinetic=None, **settings):
    net = split(kind, method=method, decoder="pixel-shuffle", reach=reach, kinetic=kinetic).train()
    if settings.get("amp_dtype") == "float16":
        settings = settings | {"lr": 1e-4}
    return TrainingState(net, OptimConfig(**settings), 10, CPU, modules, delayed=True)


def train(state, steps, first=0):
    losses = []
    # Of float16 only the loss scale is tried: the CPU has no such products for all layers.
    half = state.config.amp and state.config.amp_dtype == "bfloat16"
    for step in range(first, first + steps):
        for part in range(state.config.micro_batches):
            own = batch(seed=10 * step + part)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                losses.append(state.train_step(list(own), 100 * step + part, part + 1 == state.config.micro_batches))
    return losses


def content(state):
    return {
        **{f"net {name}": tensor for name, tensor in state.net.state_dict().items()},
        **({f"ema {name}": t for name, t in state.ema.state_dict().items()} if state.ema else {}),
        **{f"optimizer {i}": tensor for i, tensor in enumerate(state.tensors()["optimizer"])},
        **{f"scale {i}": torch.tensor(scaler.get_scale()) for i, scaler in enumerate(state.scalers) if scaler},
    }


def assert_same(a, b):
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


READING_AHEAD = ["plain", "averaged", "micro-batches, float16", "clipped", "checked by the host, micro-batches"]


@pytest.mark.parametrize(("name", "reach"), [*((name, 0) for name in SETTINGS), *((name, 1) for name in READING_AHEAD)])
def test_a_captured_step_has_the_bits_of_an_eager_step(name, reach):
    eager, graphs = (state_of(reach=reach, **SETTINGS[name]) for _ in range(2))
    pool = TapePool()
    graphs.capture(pool, pytest.fail)
    assert_same(content(eager), content(graphs))
    for a, b in zip(train(eager, 5), train(graphs, 5), strict=True):
        assert torch.equal(a, b)
    parts = 1 if eager.config.micro_batches == 1 else 2
    assert pool.captures == parts * len(eager.phases) + (eager.ema is not None and eager.mask is not None)
    assert len(eager.phases) == (7 if reach else 3)
    assert_same(content(eager), content(graphs))
    assert all(parameter.grad is None for parameter in graphs.net.parameters())


@pytest.mark.parametrize(
    ("name", "kinetic"), [*((name, 0.0) for name in SETTINGS), *((name, 0.1) for name in READING_AHEAD)]
)
def test_a_captured_step_of_exact_training_has_the_bits_of_an_eager_step(name, kinetic):
    eager, graphs = (state_of("resnet", "end-to-end", kinetic=kinetic, **SETTINGS[name]) for _ in range(2))
    pool = TapePool()
    graphs.capture(pool, pytest.fail)
    for a, b in zip(train(eager, 5), train(graphs, 5), strict=True):
        assert torch.equal(a, b)
    parts = 1 if eager.config.micro_batches == 1 else 2
    assert pool.captures == 5 * parts + (eager.ema is not None and eager.mask is not None)
    assert_same(content(eager), content(graphs))
    assert all(parameter.grad is None for parameter in graphs.net.parameters())


@pytest.mark.parametrize(
    ("kind", "method", "reach"), [("vit", "infopro", 0), ("resnet", "greedy", 2), ("swin", "infopro", 0)]
)
def test_other_models_and_methods_are_captured(kind, method, reach):
    eager, graphs = (state_of(kind, method, reach=reach) for _ in range(2))
    graphs.capture(TapePool(), pytest.fail)
    for a, b in zip(train(eager, 4), train(graphs, 4), strict=True):
        assert torch.equal(a, b)
    assert_same(content(eager), content(graphs))


def test_a_process_with_some_of_the_modules_captures_them_and_sends_copies():
    outputs = []
    for pool in (None, TapePool()):
        state = state_of(modules=range(1, 2))
        if pool:
            state.capture(pool, pytest.fail)
        first = state_of().net.local_modules[0]
        carries = []
        for step in range(4):
            carry = Carry.of(list(batch(seed=step)))
            with torch.no_grad():
                carry.features, carry.inputs = first(carry.features, carry.context), None
            carry.losses = [torch.tensor(float(step))]
            losses = state.train_step(carry, step)
            carries.append((carry.features, losses))
        outputs.append(carries)
    for eager, graphs in zip(*outputs, strict=True):
        for a, b in zip(eager, graphs, strict=True):
            assert torch.equal(a, b)


def test_a_batch_of_another_size_runs_eagerly():
    eager, graphs = (state_of() for _ in range(2))
    graphs.capture(TapePool(), pytest.fail)
    for state in (eager, graphs):
        train(state, 3)
        images, labels = batch(seed=9)
        state.train_step([images[:2], labels[:2]], 9)
        train(state, 2, first=5)
    assert_same(content(eager), content(graphs))


@pytest.mark.parametrize("opt", ["adamw", "lamb"])  # masked, and checked by the host
@pytest.mark.parametrize("others", [{0}, {1}, {0, 1}])
def test_a_micro_batch_of_another_size_adds_to_the_same_gradients(others, opt):
    eager, graphs = (state_of(micro_batches=2, opt=opt) for _ in range(2))
    graphs.capture(TapePool(), pytest.fail)
    for state in (eager, graphs):
        train(state, 3)
        for step in range(2):
            for part in range(2):
                images, labels = batch(seed=20 + part)
                size = 2 if part in others else 4
                state.train_step([images[:size], labels[:size]], step, part == 1)
        train(state, 2, first=5)
    assert_same(content(eager), content(graphs))


def test_after_a_failed_step_no_gradients_are_left_in_captured_micro_batches():
    eager, graphs = (state_of(micro_batches=2, opt="lamb") for _ in range(2))
    graphs.capture(TapePool(), pytest.fail)
    for state in (eager, graphs):
        train(state, 4)
        images, labels = batch(seed=20)
        state.train_step([images, labels], 0, False)
        with pytest.raises(NonFiniteLossError):
            state.train_step([images * float("nan"), labels], 1, True)
        train(state, 2, first=5)
    assert_same(content(eager), content(graphs))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("when", ["first", "last"])
@pytest.mark.parametrize("finds", [True, False])
def test_a_step_that_cannot_be_captured_runs_eagerly_and_says_why(parts, when, finds):
    eager, graphs = (state_of(micro_batches=parts) for _ in range(2))
    reasons = []
    graphs.capture(TapePool(finds), reasons.append)
    masked = graphs.steps.step_masked

    def ask(i, loss, last, average):
        if i == 1 and last == (when == "last" or parts == 1):
            loss.item()
        masked(i, loss, last, average)

    graphs.steps.step_masked = ask
    for a, b in zip(train(eager, 5), train(graphs, 5), strict=True):
        assert torch.equal(a, b)
    assert len(reasons) == 1
    assert ("waits for the device" if finds else "not permitted when stream is capturing") in reasons[0]
    assert_same(content(eager), content(graphs))


@pytest.mark.parametrize("name", [name for name in SETTINGS if not name.startswith("checked")])
def test_a_masked_step_asks_the_device_for_no_number(name):
    state = state_of(**SETTINGS[name])
    train(state, 1)
    with Reads() as reads:
        train(state, 2, first=1)
    assert reads.count == 0


def test_an_optimizer_that_cannot_be_masked_asks_once_a_module():
    state = state_of(opt="lion")
    train(state, 1)
    with Reads() as reads:
        train(state, 1, first=1)
    assert reads.count == 3


class UnusedPool:
    """A pool that needs no CUDA; it captures nothing."""

    def __init__(self, device):
        pass


@pytest.mark.parametrize(
    ("first", "start", "every", "step"),
    [
        *[(1, 0, every, every * -(-3 // every)) for every in (1, 2, 3, 4)],
        *[(1, 0, 5, None), (1, 97, 100, 100), (1, 96, 100, 100), (1, 95, 100, None), (1, 0, None, None)],
        *[(0, 0, 1, None), (0, 97, 100, None)],
    ],
)
def test_a_process_that_receives_captures_nothing_where_a_checkpoint_would_hold_its_batches(
    first, start, every, step, monkeypatch
):
    monkeypatch.setattr(captured, "CudaGraphPool", UnusedPool)
    state, lines = state_of(modules=range(first, 2)), []
    state.step = start
    captured.use_graphs(state, RunConfig(checkpoint_steps=every), torch.device("cuda"), False, lines.append)
    assert (state.captured is None) == (step is not None)
    assert [line.partition(" waits")[0] for line in lines] == (
        [] if step is None else [f"no CUDA graphs: the checkpoint of step {step}"]
    )


def test_a_process_asks_for_as_many_batches_as_are_in_flight():
    assert captured.AHEAD == IN_FLIGHT


def test_forgotten_gradients_are_such_that_adding_to_them_changes_no_bit():
    values = torch.tensor([0.0, -0.0, 1.5, -2.0])
    gradient = torch.full((4,), 3.0)
    forget([gradient])
    gradient += values
    assert torch.equal(gradient.view(torch.int32), values.view(torch.int32))
