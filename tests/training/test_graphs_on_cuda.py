"""Training on CUDA: graphs have the bits of eager steps, the host does not wait, and the measured memory is right."""

import hashlib
from contextlib import contextmanager

import pytest
import torch
from test_captured import SETTINGS, assert_same, content

from localprop.cli import main
from localprop.network.graphs import CudaGraphPool
from localprop.report.results import read_results
from localprop.runs.repeatable import repeatable_kernels
from localprop.settings.config import OptimConfig
from localprop.training.state import TrainingState, autocast
from tiny import batch, split

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def kernels_of_a_run():
    """As in a run, or no two trainings with convolutions are equal."""
    with repeatable_kernels(False):
        yield


def state_of(kind="swin", method="feature-reconstruction", options=None, **settings):
    net = split(kind, method=method, **{"decoder": "pixel-shuffle"} | (options or {})).to(CUDA).train()
    return TrainingState(net, OptimConfig(**settings), 10, CUDA)


def train(state, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        for part in range(state.config.micro_batches):
            own = [tensor.to(CUDA) for tensor in batch(seed=10 * step + part)]
            with autocast(state.config, CUDA):
                losses.append(state.train_step(own, 100 * step + part, part + 1 == state.config.micro_batches))
    return [own.cpu() for own in losses]


@pytest.mark.parametrize("reach", [0, 1])
@pytest.mark.parametrize("name", SETTINGS)
def test_graphs_have_the_bits_of_eager_steps(name, reach):
    eager, graphs = (state_of(options={"reach": reach, "kinetic": 0.1 * reach}, **SETTINGS[name]) for _ in range(2))
    graphs.capture(CudaGraphPool(CUDA), pytest.fail)
    for a, b in zip(train(eager, 6), train(graphs, 6), strict=True):
        assert torch.equal(a, b)
    assert_same(content(eager), content(graphs))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", ["swin", "resnet"])
def test_graphs_of_exact_training_have_the_bits_of_eager_steps(kind, name):
    eager, graphs = (state_of(kind, "end-to-end", {"kinetic": 0.1}, **SETTINGS[name]) for _ in range(2))
    graphs.capture(CudaGraphPool(CUDA), pytest.fail)
    for a, b in zip(train(eager, 6), train(graphs, 6), strict=True):
        assert torch.equal(a, b)
    assert_same(content(eager), content(graphs))


@pytest.mark.parametrize("kind", ["swin", "vit", "resnet"])
@pytest.mark.parametrize("method", ["greedy", "infopro", "feature-reconstruction"])
@pytest.mark.parametrize("decoder", ["conv", "deconv", "pixel-shuffle", "transformer", "infopro"])
def test_models_methods_and_decoders_are_captured(kind, method, decoder):
    if method == "greedy" and decoder != "conv":
        pytest.skip("greedy has no decoder")
    eager, graphs = (state_of(kind, method, {"decoder": decoder}, amp=True) for _ in range(2))
    graphs.capture(CudaGraphPool(CUDA), pytest.fail)
    for a, b in zip(train(eager, 4), train(graphs, 4), strict=True):
        assert torch.equal(a, b)
    assert_same(content(eager), content(graphs))


def test_checkpointed_units_are_captured_or_run_eagerly():
    eager, graphs = (state_of(options={"grad_checkpointing": True}) for _ in range(2))
    reasons = []
    graphs.capture(CudaGraphPool(CUDA), reasons.append)
    for a, b in zip(train(eager, 4), train(graphs, 4), strict=True):
        assert torch.equal(a, b)
    assert_same(content(eager), content(graphs))
    print("checkpointing under graphs:", reasons or "captured")


class PoolWithoutSearch(CudaGraphPool):
    """Finds no code that waits for the device, so that its capture fails."""

    @contextmanager
    def find_syncs(self):
        yield []


@pytest.mark.parametrize("pool", [CudaGraphPool, PoolWithoutSearch])
def test_a_step_that_cannot_be_captured_runs_eagerly_and_says_why(pool):
    eager, graphs, others = (state_of() for _ in range(3))
    reasons = []
    graphs.capture(pool(CUDA), reasons.append)
    masked = graphs.steps.step_masked

    def ask(i, loss, last, average):
        if i == 1:
            loss.item()
        masked(i, loss, last, average)

    graphs.steps.step_masked = ask
    losses = train(eager, 4)
    for a, b in zip(losses, train(graphs, 4), strict=True):
        assert torch.equal(a, b)
    assert len(reasons) == 1
    assert ("waits for the device" if pool is CudaGraphPool else "cannot be captured") in reasons[0]
    assert_same(content(eager), content(graphs))
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    others.capture(CudaGraphPool(CUDA), pytest.fail)  # torch is in order: another network can be captured
    for a, b in zip(losses, train(others, 4), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("name", [name for name in SETTINGS if not name.startswith("checked")])
def test_a_step_waits_for_nothing(name, captured):
    state = state_of(**SETTINGS[name])
    if captured:
        state.capture(CudaGraphPool(CUDA), pytest.fail)
    train(state, 3)
    parts = state.config.micro_batches
    batches = [[tensor.to(CUDA) for tensor in batch(seed=seed)] for seed in range(2 * parts)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number, own in enumerate(batches):
            with autocast(state.config, CUDA):
                state.train_step(own, number, number % parts + 1 == parts)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("captured", [False, True])
def test_what_is_not_finite_is_masked(captured):
    state = state_of("mlp", "greedy", clip_grad=1.0, model_ema=True)
    if captured:
        state.capture(CudaGraphPool(CUDA), pytest.fail)
    train(state, 3)
    before = {name: tensor.clone() for name, tensor in content(state).items()}
    images, labels = (tensor.to(CUDA) for tensor in batch())
    losses = state.train_step([images * float("nan"), labels], 0).tolist()
    flags = state.mask.flags.tolist()
    train(state, 1, first=5)
    assert_same(before, content(state))
    assert "the loss of module 1 of 3" in str(state.problem(losses, flags, 4))
    train(state, 1, first=6)
    assert not torch.equal(next(iter(before.values())), next(iter(content(state).values())))


SMALL = [
    *["train", "--data", "synthetic", "--img-size", "32", "--batch-size", "64", "--epochs", "2", "--device", "cuda"],
    *["--modules", "4", "--min-depth", "0", "--experiment", "run"],
]


def weights(folder):
    return hashlib.sha256((folder / "run/model.safetensors").read_bytes()).hexdigest()


def parts(folder):
    """The newest checkpoint's modules, with their optimizers, loss scales and moving averages."""
    newest = max((folder / "run/checkpoints").iterdir(), key=lambda path: path.name)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in newest.glob("module-*")}


@pytest.mark.parametrize("flags", [[], ["--amp", "--model-ema", "--clip-grad", "1", "--micro-batches", "2"]])
def test_a_run_and_its_resumption_have_the_same_bits_with_and_without_graphs(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for choice in ("on", "off"):
        assert main([*SMALL, *flags, "--cuda-graphs", choice, "--output", choice]) == 0
    assert main([*SMALL, *flags, "--cuda-graphs", "on", "--steps", "7", "--output", "stopped"]) == 0
    assert main(["train", "--resume", "stopped/run"]) == 0
    assert len({weights(tmp_path / folder) for folder in ("on", "off", "stopped")}) == 1
    assert parts(tmp_path / "on") == parts(tmp_path / "off") == parts(tmp_path / "stopped")


@pytest.mark.parametrize("decoder", ["conv", "deconv", "pixel-shuffle", "transformer", "infopro"])
def test_resumed_equals_uninterrupted_with_every_decoder(decoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [*SMALL, "--decoder", decoder, "--amp"]
    assert main([*flags, "--output", "whole"]) == 0
    assert main([*flags, "--steps", "5", "--output", "stopped"]) == 0
    assert main(["train", "--resume", "stopped/run"]) == 0
    assert weights(tmp_path / "whole") == weights(tmp_path / "stopped")


def test_the_measured_peak_is_that_of_eager_steps_and_buffers(tmp_path, monkeypatch):
    """During replays the allocator counts none of a graph's own memory: the peak is that of the capture."""
    monkeypatch.chdir(tmp_path)
    peaks = []
    for choice in ("off", "on"):
        assert main([*SMALL, "--epochs", "1", "--cuda-graphs", choice, "--output", choice]) == 0
        peaks.append(read_results(tmp_path / choice / "run/results.csv")[-1].peak_memory)
    batch_size = 64 * 3 * 32 * 32 * 4
    assert peaks[0] <= peaks[1] * 1.02
    assert peaks[1] <= peaks[0] * 1.05 + 2 * batch_size + (64 << 20)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_processes_with_graphs_have_the_bits_of_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [flag for flag in SMALL if flag not in ("--device", "cuda")]
    assert main([*flags, "--cuda-graphs", "off", "--output", "one"]) == 0
    assert main([*flags, "--cuda-graphs", "on", "--parallel", "modules", "--nproc", "2", "--output", "two"]) == 0
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
