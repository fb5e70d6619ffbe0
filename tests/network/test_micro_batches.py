"""Batches that are divided: the same step, less memory, and predicted as it is."""

import gc
import json
import weakref
from itertools import chain

import pytest
import torch
from safetensors.torch import load_file

import localprop.runs.experiment
from localprop import plan
from localprop.cli import main
from localprop.data.base import Data
from localprop.errors import ConfigError, PlanError
from localprop.memory.measure import measured, total_bytes
from localprop.network.carry import Carry
from localprop.parallel.placement import IN_FLIGHT
from localprop.planning.processes import share_out
from localprop.planning.schedules import Link
from localprop.planning.simulation import simulate_step
from localprop.planning.steps import PARTS
from localprop.report.losses import read_losses
from localprop.report.results import read_results
from localprop.settings.config import OptimConfig
from localprop.training.state import TrainingState
from tiny import SIZE, batch, build, split

CPU = torch.device("cpu")
BATCH = 24
TINY = [
    *["--model-kwargs", "patch_size=4", "window_size=2", "embed_dim=12", "depths=(1,1)", "num_heads=(1,2)"],
    *["--min-depth", "0", "--cuts", "patch_embed", "layers.0"],
    *["--batch-size", "256", "--epochs", "1", "--device", "cpu"],
]


def state_of(net, parts, **settings):
    return TrainingState(net, OptimConfig(micro_batches=parts, **settings), 10, CPU)


def step(state, given, seed=0):
    """A step, as the trainer takes it; gives the mean losses."""
    parts = state.config.micro_batches
    losses = [
        state.train_step(part, seed, last=number + 1 == parts)
        for number, part in enumerate(Carry.micro_batches(given, parts))
    ]
    return torch.stack(losses).mean(0)


@pytest.mark.parametrize("parts", [2, 3, 8])
@pytest.mark.parametrize("settings", [{"opt": "sgd", "lr": 0.1}, {"opt": "sgd", "lr": 0.1, "clip_grad": 0.1}])
def test_a_step_in_parts_is_the_step_of_the_whole_batch(parts, settings):
    states = [state_of(split("vit", 3).double().eval(), count, **settings) for count in (1, parts)]  # eval: no dropout
    for seed in range(3):
        images, labels = batch(BATCH)
        whole, divided = (step(state, [images.double() + seed, labels.clone()]) for state in states)
        assert torch.allclose(whole, divided, rtol=1e-6)  # they are told in float32
    for a, b in zip(states[0].net.parameters(), states[1].net.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-11)
    assert [state.step for state in states] == [3, 3]


def test_parts_are_copies_and_the_batch_goes_with_the_last():
    images, labels = batch(6)
    given = [images.clone(), labels]
    parts = []
    whole = weakref.ref(given[0].untyped_storage())
    for number, carry in enumerate(Carry.micro_batches(given, 3)):
        assert [len(given), whole() is None] == ([2, False] if number < 2 else [0, True])
        assert carry.features.shape[0] == 2
        assert carry.features.untyped_storage().nbytes() == carry.features.nbytes
        parts.append(carry)
    assert torch.equal(torch.cat([carry.features for carry in parts]), images)
    assert torch.equal(torch.cat([carry.targets for carry in parts]), labels)


def real_peak(net, parts):
    """The measured peak of a second step, whose whole batch begins inside."""
    state = state_of(net.train(), parts)
    kept = batch(BATCH)
    step(state, list(kept))
    with measured(chain(*state.tensors().values()), CPU) as measurement:
        step(state, [tensor.clone() for tensor in kept], seed=1)
    return measurement.peak


@pytest.mark.parametrize("parts", [1, 2, 6])
@pytest.mark.parametrize(
    ("name", "method"),
    [("swin", "feature-reconstruction"), ("resnet", "infopro"), ("mlp", "greedy"), ("cnn", "greedy")],
)
def test_the_predicted_peak_is_that_of_a_real_step(name, method, parts):
    net = split(name, 3, method)
    trace = simulate_step(net, OptimConfig(micro_batches=parts), BATCH, SIZE)
    assert trace.peak == pytest.approx(real_peak(net, parts), rel=0.01)
    assert sum(trace.parts.values()) == trace.peak == max(used for _, used in trace.timeline)
    assert trace.parts.keys() == set(PARTS)
    assert all(size >= 0 for size in trace.parts.values())
    assert len(trace.module_ends) == 3 * parts
    assert trace.module_ends == sorted(trace.module_ends)
    assert trace.module_ends[-1] == pytest.approx(trace.seconds)
    assert sum(trace.module_seconds) == pytest.approx(trace.seconds)


def test_parts_take_less_memory_and_about_the_same_time():
    net = split("swin", 2)
    one, two, six = (simulate_step(net, OptimConfig(micro_batches=parts), BATCH, SIZE) for parts in (1, 2, 6))
    activations = [trace.parts["activations"] + trace.parts["temporaries"] for trace in (one, two, six)]
    assert activations[2] < 0.3 * activations[0] < 0.6 * activations[1] < 0.6 * activations[0]
    assert six.parts["gradients"] >= 4 * sum(p.numel() for p in net.parameters()) > one.parts["gradients"]
    assert six.flops == pytest.approx(one.flops, rel=0.01)
    assert one.seconds < six.seconds < 2 * one.seconds  # weights are read more often


def test_the_trainer_measures_what_is_predicted(tmp_path):
    peaks = {}
    for parts in (1, 2, 4):
        flags = ["--micro-batches", str(parts), "--steps", "3", "--output", str(tmp_path), "--experiment", str(parts)]
        assert main(["train", *TINY, *flags]) == 0
        (row,) = read_results(tmp_path / str(parts) / "results.csv")
        assert row.peak_memory == pytest.approx(row.predicted_memory, rel=0.03)
        assert row.step == 3
        peaks[parts] = row.peak_memory
    assert peaks[4] < peaks[2] < peaks[1]


def test_one_batch_is_there_at_a_time(tmp_path, monkeypatch):
    step, alive = TrainingState.train_step, []

    def train_step(*args, **kwargs):
        alive.append(sum(type(thing) is Carry for thing in gc.get_objects()))
        return step(*args, **kwargs)

    monkeypatch.setattr(TrainingState, "train_step", train_step)
    flags = ["--micro-batches", "4", "--steps", "3", "--output", str(tmp_path), "--experiment", "run"]
    assert main(["train", *TINY, *flags]) == 0
    assert len(alive) == 2 + 3 * 4  # those of the prediction come first
    assert alive[2 + 2 * 4 :] == [1] * 4  # behind the two that are measured, with a copy


def test_the_trainer_counts_gradients_that_wait(tmp_path):
    wide = ["--model-kwargs", "patch_size=4", "window_size=2", "embed_dim=96", "depths=(1,1)", "num_heads=(1,2)"]
    flags = [*wide, *TINY[6:], "--batch-size", "128", "--micro-batches", "32", "--steps", "3"]
    assert main(["train", *flags, "--output", str(tmp_path), "--experiment", "run"]) == 0
    (row,) = read_results(tmp_path / "run" / "results.csv")
    parameters = json.loads((tmp_path / "run" / "run.json").read_text())["parameters"]
    assert 4 * parameters > 0.1 * row.peak_memory  # so many bytes are the gradients
    assert row.peak_memory == pytest.approx(row.predicted_memory, rel=0.001)


def test_a_plan_divides_the_batch_where_nothing_else_fits():
    net = split("cnn", 2, "greedy")
    whole = simulate_step(net, OptimConfig(), BATCH, SIZE).peak
    options = {"modules": (2,), "method": "greedy", "input_size": SIZE}
    result = plan(build("cnn"), BATCH, **options, budget=whole // 2)
    choice = result.choice
    assert choice.batch_size == BATCH
    assert BATCH % choice.micro_batches == 0
    assert choice.step.peak <= whole // 2
    fewer = max(n for n in range(1, choice.micro_batches) if BATCH % n == 0)
    assert simulate_step(net, OptimConfig(micro_batches=fewer), BATCH, SIZE).peak > whole // 2
    recipe = choice.setting.recipe
    again = {"cuts": recipe.cuts, "recompute_units": recipe.recompute_units, "split_blocks": recipe.split_blocks}
    net = localprop.localize(build("cnn"), method="greedy", input_size=SIZE, **again)
    assert simulate_step(net, OptimConfig(micro_batches=choice.micro_batches), BATCH, SIZE).peak == choice.step.peak


def test_gradients_of_parts_in_a_loop_of_ones_own():
    whole, divided = (split("mlp", 2, "greedy").eval() for _ in range(2))
    images, labels = batch(8)
    whole.backward(images, labels)
    for part in range(2):
        divided.backward(images[4 * part :][:4], labels[4 * part :][:4], parts=2)
    for a, b in zip(whole.parameters(), divided.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_a_process_holds_micro_batches_in_flight():
    net, optim = split("vit", 2), OptimConfig(micro_batches=4)
    result = share_out(net, simulate_step(net, optim, BATCH, SIZE), optim, BATCH, SIZE, "cpu", 2, Link())
    images, labels = batch(BATCH // 4)
    entry = total_bytes([net.local_modules[0](images, {}).detach(), labels])
    for k, peak in enumerate(result.peaks):
        alone = simulate_step(net, optim, BATCH, SIZE, modules=range(k, k + 1))
        assert peak == alone.peak + IN_FLIGHT * entry
    assert result.micro_batches == 4
    slow = share_out(net, simulate_step(net, optim, BATCH, SIZE), optim, BATCH, SIZE, "cpu", 2, Link(bandwidth=1e5))
    assert slow.timing.seconds == pytest.approx(4 * entry / 1e5, rel=0.01)


@pytest.mark.parametrize(("batch_size", "parts", "better"), [(32, 5, 35), (4, 8, 8)])
def test_a_batch_that_does_not_divide_is_an_error_of_one_line(batch_size, parts, better, capsys):
    for command in ("train", "plan"):
        assert main([command, "--batch-size", str(batch_size), "--micro-batches", str(parts)]) == 2
        line = capsys.readouterr().err
        assert f"does not divide equally into {parts} micro-batches; take --batch-size {better}" in line
        assert line.count("\n") == 1
    with pytest.raises(ConfigError, match="equally into"):
        plan(build("mlp"), batch_size, micro_batches=parts, input_size=SIZE)


def test_training_in_parts_reports_and_averages_as_undivided_training_does(tmp_path, monkeypatch):
    sizes = {"evaluated": [], "cut for": []}
    test_batches, divide = Data.test_batches, localprop.runs.experiment.divide

    def evaluated(self, batch_size, device):
        sizes["evaluated"].append(batch_size)
        return test_batches(self, batch_size, device)

    def cut(*args, **options):
        sizes["cut for"].append((options["batch_size"], options["micro_batches"]))
        return divide(*args, **options)

    monkeypatch.setattr(Data, "test_batches", evaluated)
    monkeypatch.setattr("localprop.runs.experiment.divide", cut)
    # Steps of the gradient's size, and nothing that is drawn: roundings alone differ.
    calm = ["drop_path_rate=0.0", "--opt", "sgd", "--lr", "0.05", "--model-ema", "--model-ema-decay", "0.5"]
    for parts in (1, 4):
        flags = ["--micro-batches", str(parts), "--output", str(tmp_path), "--experiment", str(parts)]
        assert main(["train", *TINY[:6], *calm, *TINY[6:], *flags]) == 0
    one, four = (read_losses(tmp_path / name / "losses.csv") for name in "14")
    for a, b in zip(one, four, strict=True):
        assert b[3:] == pytest.approx(a[3:], rel=1e-4)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in "14"]
    for name, value in weights[0].items():
        assert torch.allclose(weights[1][name], value, rtol=1e-4, atol=1e-6), name
    assert sizes == {"evaluated": [256, 64], "cut for": [(256, 1), (256, 4)]}


def test_every_part_draws_for_itself_and_the_first_as_an_undivided_batch(tmp_path, monkeypatch):
    train_step, drawn = TrainingState.train_step, {}

    def noted(self, batch, seed, last=True):
        drawn.setdefault(self.config.micro_batches, []).append(seed)
        return train_step(self, batch, seed, last)

    monkeypatch.setattr(TrainingState, "train_step", noted)
    monkeypatch.setattr("localprop.runs.headroom.simulate_step", lambda *_: (_ for _ in ()).throw(PlanError("not now")))
    for parts in (1, 4):
        flags = ["--micro-batches", str(parts), "--output", str(tmp_path), "--experiment", str(parts)]
        assert main(["train", *TINY, *flags]) == 0
    assert drawn[4][::4] == drawn[1]
    assert len(set(drawn[4])) == len(drawn[4]) == 4 * len(drawn[1])
