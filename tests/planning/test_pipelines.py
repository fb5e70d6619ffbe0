"""What several processes take: predicted against what a process with its own modules, or its stage, really takes."""

import functools
import json
from collections import deque
from dataclasses import replace
from itertools import chain, pairwise

import pytest
import timm
import torch
from rich.console import Console
from torch.nn import functional as F

from localprop import plan
from localprop.cli import main
from localprop.errors import ConfigError, ParallelError
from localprop.memory.cost import Costs
from localprop.memory.measure import measured, total_bytes
from localprop.network.carry import Carry
from localprop.parallel.placement import IN_FLIGHT
from localprop.planning.processes import pipeline, share_out
from localprop.planning.schedules import Link, one_f_one_b_order
from localprop.planning.simulation import simulate_step
from localprop.planning.tables import processes_table
from localprop.settings.config import OptimConfig
from localprop.training.optimizers import create_optimizer
from localprop.training.state import TrainingState
from tiny import SIZE, batch, build, split, units_of

BATCH = 16
CPU = torch.device("cpu")


class Beside:
    """Takes what a process gives back, and gives it gradients that come as new memory."""

    def give_back(self, carry):
        self.sent, carry.gradient = carry.gradient, None

    def hand_on(self, carry):
        carry.gradient = torch.ones_like(carry.features)

    def settle(self):
        self.sent = None


def real_peak(net, config, modules):
    """The measured peak of the second step of a process that trains some modules."""
    images, labels = batch(BATCH)
    features, context, looks = images, {}, any(net.local_modules[k].local_loss.uses_inputs for k in modules)
    with torch.no_grad():
        for module in net.local_modules[: modules.start]:
            features = module(features, context)

    def arriving():
        came = features.clone()
        own = None if not looks else came if modules.start == 0 else images.clone()
        return Carry(came, labels.clone(), own, dict(context), [torch.zeros(()) for _ in range(modules.start)])

    state = TrainingState(net.train(), config, 10, CPU, modules, exchange=Beside())
    state.train_step(arriving(), seed=0)
    with measured(chain(*state.tensors().values()), CPU) as measurement:
        state.train_step(arriving(), seed=1)
    return measurement.peak


@functools.cache
def whole_step(name, method, model_ema):
    """The simulated step of a process that trains all modules."""
    return simulate_step(split(name, 3, method), OptimConfig(model_ema=model_ema), BATCH, SIZE)


@pytest.mark.parametrize(
    ("name", "method"),
    [("swin", "feature-reconstruction"), ("vit", "infopro"), ("resnet", "greedy"), ("cnn", "greedy")],
)
@pytest.mark.parametrize("modules", [range(0, 1), range(1, 3), range(2, 3)])
def test_the_predicted_peak_of_a_process_is_that_of_a_real_one(name, method, modules):
    config = OptimConfig(model_ema=name == "vit")
    step = simulate_step(split(name, 3, method), config, BATCH, SIZE, modules=modules)
    assert step.peak == pytest.approx(real_peak(split(name, 3, method), config, modules), rel=0.01)
    assert step.module in modules
    whole = whole_step(name, method, config.model_ema)
    assert step.peak < whole.peak
    starts = [0.0, *whole.module_ends]
    assert step.seconds < 1.2 * (whole.module_ends[modules[-1]] - starts[modules.start])


@pytest.mark.parametrize("reach", [1, 2])
@pytest.mark.parametrize(("name", "method"), [("swin", "feature-reconstruction"), ("vit", "infopro")])
@pytest.mark.parametrize("modules", [range(0, 1), range(1, 3), range(1, 2)])
def test_the_predicted_peak_of_a_process_whose_heads_read_ahead_is_that_of_a_real_one(name, method, reach, modules):
    config = OptimConfig()
    step = simulate_step(split(name, 3, method, reach=reach), config, BATCH, SIZE, modules=modules)
    assert step.peak == pytest.approx(real_peak(split(name, 3, method, reach=reach), config, modules), rel=0.01)
    assert (step.ahead > 0, step.behind > 0) == (modules.start > 0, modules.stop < 3)
    assert 0 < step.seconds - step.ahead - step.behind < step.seconds


def in_three_processes(net):
    """A module in each: what that takes, the step of each process alone, and the bytes that come to it."""
    step = simulate_step(net, OptimConfig(), BATCH, SIZE)
    result = share_out(net, step, OptimConfig(), BATCH, SIZE, "cpu", 3, Link())
    alone = [simulate_step(net, OptimConfig(), BATCH, SIZE, modules=range(k, k + 1)) for k in range(3)]
    images, labels = batch(BATCH)
    sizes = [0]
    for module in net.local_modules[:2]:
        images = module(images, {}).detach()
        sizes.append(total_bytes([images, labels]))
    return result, alone, sizes


def test_one_batch_is_in_flight_where_heads_read_ahead():
    result, alone, sizes = in_three_processes(split("vit", 3, "greedy", reach=1))
    assert result.peaks == [own.peak + came for own, came in zip(alone, sizes, strict=True)]
    # A process waits while the next one reads ahead, and between its turns for what it waits for itself.
    turns = [own.seconds + later.ahead for own, later in pairwise(alone)]
    assert result.timing.seconds >= max(turns) * (1 - 1e-9)


def test_processes_hold_the_batches_in_flight():
    result, alone, sizes = in_three_processes(split("vit", 3))
    held = [IN_FLIGHT * (came + left) for came, left in pairwise([*sizes, 0])]
    assert result.peaks == [own.peak + more for own, more in zip(alone, held, strict=True)]
    assert result.timing.seconds == pytest.approx(max(own.seconds for own in alone))
    assert result.largest == max(range(3), key=lambda rank: result.peaks[rank])


def test_replicas_share_the_batch_and_reduce_gradients():
    net = split("swin", 2, "greedy")
    step = simulate_step(net, OptimConfig(), BATCH, SIZE)
    one, two = (share_out(net, step, OptimConfig(), BATCH, SIZE, "cpu", n, Link()) for n in (2, 4))
    assert (one.replicas, two.replicas) == (1, 2)
    assert two.ranks == one.ranks == [range(0, 1), range(1, 2)]
    assert two.timing.seconds < one.timing.seconds
    slow = share_out(net, step, OptimConfig(), BATCH, SIZE, "cpu", 4, Link(bandwidth=1e5))
    gradients = [total_bytes(module.parameters()) for module in net.local_modules]
    assert slow.timing.seconds >= max(gradients) / 1e5
    with pytest.raises(ConfigError, match="15 does not divide equally into 2 replicas; take --batch-size 16"):
        share_out(net, step, OptimConfig(), 15, SIZE, "cpu", 4, Link())


def real_stage_peak(name, rank, ranks, names, micro, count):
    """The measured peak of a stage that computes a batch's micro-batches in 1F1B's order, written out by hand."""
    model = build(name).train()
    units = list(units_of(name))
    own = [unit for unit in units if unit.name in names]
    images, labels = batch(micro)
    source = images
    with torch.no_grad():
        for unit in units[: units.index(own[0])]:
            source = unit(model, source, {})
    weights = [model.get_parameter(name) for unit in own for name in unit.parameters]
    optimizer = create_optimizer(torch.nn.ParameterList(weights), OptimConfig())

    def step():
        outputs = deque()
        for kind, _ in one_f_one_b_order(rank, ranks, count):
            if kind == "F":
                output = source.clone().requires_grad_(rank > 0)
                for unit in own:
                    output = unit(model, output, {})
                outputs.append(F.cross_entropy(output, labels.clone()) if rank == ranks - 1 else output)
                del output
            else:
                output = outputs.popleft()
                output.backward(None if rank == ranks - 1 else torch.ones_like(output))
                del output
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    state = [t for values in optimizer.state.values() for t in values.values()]
    with measured([*weights, *model.buffers(), *state], CPU) as measurement:
        step()
    return measurement.peak


@pytest.mark.parametrize(("name", "ranks", "batch_size"), [("vit", 2, 32), ("cnn", 3, 40), ("swin", 2, 32)])
def test_the_predicted_peak_of_a_1f1b_stage_is_that_of_a_real_one(name, ranks, batch_size):
    model = build(name)
    result = pipeline(Costs(model, units_of(name)), OptimConfig(), batch_size, "cpu", None, ranks, Link())
    assert result.micro_batches == 4
    assert [*chain(*result.units)] == [unit.name for unit in units_of(name)]
    for rank, names in enumerate(result.units):
        real = real_stage_peak(name, rank, ranks, names, batch_size // 4, 4)
        assert result.peaks[rank] == pytest.approx(real, rel=0.02)


def test_a_pipeline_that_cannot_be_is_none():
    costs = Costs(build("cnn"), units_of("cnn"))
    assert pipeline(costs, OptimConfig(), 3, "cpu", None, 2, Link()) is None  # no four micro-batches
    assert pipeline(costs, OptimConfig(), 64, "cpu", None, 50, Link()) is None


def test_a_plan_for_processes():
    model = timm.create_model("test_vit", img_size=32, patch_size=4, depth=3, embed_dim=32, num_heads=2)
    arguments = {"modules": (2, 3), "method": "greedy", "partition": "compute"}
    plain = plan(model, 16, **arguments)
    result = plan(model, 16, **arguments, nproc=2)
    assert [row.step for row in result.rows] == [row.step for row in plain.rows]
    assert all(row.parallel is None for row in [*plain.rows, *result.rows[:2]])
    assert plain.pipeline is None
    for row in result.rows[2:]:
        assert [*chain(*row.parallel.ranks)] == [*range(row.setting.modules)]
        assert [*chain(*row.parallel.units)] == [*chain(*row.module_units)]
        assert max(row.parallel.peaks) < row.step.peak
        assert 1 < result.speedup(row) <= 2.2
    assert 0.5 < result.pipeline_speedup < 2  # of four images, calling operations takes more time than computing them
    two = result.rows[2]
    ratio = result.pipeline.timing.seconds / two.parallel.timing.seconds
    assert result.against_pipeline(two) == pytest.approx(ratio)
    far = plan(model, 16, **arguments | {"modules": (2,)}, nproc=2, bandwidth=1e5).rows[2]
    assert far.parallel.timing.bottleneck == "link 0-1"
    # Features of 16 images: 64 tokens and a class token, of 32 floats; and labels.
    assert far.parallel.timing.seconds == pytest.approx((16 * 65 * 32 * 4 + 16 * 8) / 1e5)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"modules": (2,), "nproc": 3}, ParallelError, "3 processes cannot share 2 modules"),
        ({"modules": (2, 3), "nproc": 7}, ParallelError, "7 processes cannot share"),
        ({"nproc": 0}, ConfigError, "nproc is 0"),
        ({"nproc": 2, "budget": 2**30}, ConfigError, "leave out either budget or nproc"),
    ],
)
def test_a_mistake_is_one_line(options, error, words):
    with pytest.raises(error, match=words) as caught:
        plan(build("mlp"), 15, method="greedy", input_size=SIZE, **options)
    assert "\n" not in str(caught.value)


KWARGS = ["img_size=32", "patch_size=4", "depth=2", "embed_dim=32", "num_heads=2"]
COMMAND = ["plan", "--model", "test_vit", "--model-kwargs", *KWARGS, "--num-classes", "5", "--method", "greedy"]


def test_the_command_adds_a_table_and_keeps_the_rest(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    texts, reports = [], []
    for more in ([], ["--parallel", "modules", "--nproc", "2"]):
        assert main([*COMMAND, "--batch-size", "64", "--modules", "2", "--json", "plan.json", *more]) == 0
        # Without the columns' widths.
        texts.append([" ".join(line.split()) for line in capsys.readouterr().out.splitlines()])
        reports.append(json.loads((tmp_path / "plan.json").read_text()))
    searched = range(texts[0].index("exact, the fastest"), texts[0].index("picture: plan.png"))  # in one process alone
    kept = [line for i, line in enumerate(texts[0]) if i not in searched]
    added = [line for line in texts[1] if line not in kept]
    assert [line for line in texts[1] if line not in added] == kept
    for before, row in zip(reports[0]["rows"], reports[1]["rows"], strict=True):
        processes = row.pop("parallel")
        assert row == before
        assert (processes is None) == (row["modules"] == 1)
        if processes:
            (line,) = [line for line in added if line.startswith(row["setting"])]
            assert f"{max(rank['peak'] for rank in processes['ranks']) / 2**20:.0f}" in line.split()
            assert f"{processes['speedup']:.2f}x" in line.split()
            assert [k for rank in processes["ranks"] for k in rank["modules"]] == [*range(1, row["modules"] + 1)]
    (line,) = [line for line in added if line.startswith("1F1B")]
    assert f"{reports[1]['pipeline']['speedup']:.2f}x" in line.split()
    assert reports[1]["pipeline"]["micro_batches"] == 4
    assert "pipeline" not in reports[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--parallel", "modules"], "--parallel needs --nproc"),
        (["--nproc", "2"], "add --parallel modules"),
        (["--parallel", "modules", "--nproc", "0"], "--nproc is 0"),
        (["--parallel", "modules", "--nproc", "2", "--budget", "1GiB"], "leave out either --budget or --parallel"),
        (["--parallel", "modules", "--nproc", "2", "--bandwidth", "fast"], "is no number of bytes"),
        (["--parallel", "modules", "--nproc", "2", "--modules", "4", "--cuts", "blocks.0"], "1 cuts make 2 modules"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    assert main([*COMMAND, *flags]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_narrow_terminal_cuts_no_numbers_off(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    layers = (layer for _ in range(8) for layer in (torch.nn.Linear(3072, 3072), torch.nn.GELU()))
    model = torch.nn.Sequential(torch.nn.Flatten(), *layers, torch.nn.Linear(3072, 5))
    result = plan(model, 16, modules=(8,), method="greedy", input_size=SIZE, nproc=8)
    Console().print(processes_table(result))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    (heading,) = [line for line in lines if line.startswith("setting")]
    assert heading.split() == ["setting", "modules", "peak", "in", "busiest", "waits", "faster", "1F1B", "=", "1"]
    speeds = [result.speedup(result.rows[-1]), result.pipeline_speedup]
    rows = [line for line in lines if line.startswith(("K=8", "1F1B"))]
    assert all(f"{speed:.2f}x" in line.split() for speed, line in zip(speeds, rows, strict=True))
    assert "…" not in "".join(lines)


def test_settings_that_the_processes_cannot_share_say_why(capsys):
    result = plan(build("mlp"), 4, modules=(2, 3), method="greedy", input_size=SIZE, nproc=3)
    two = next(row for row in result.rows if row.setting.modules == 2)
    assert two.parallel is None
    assert two.not_parallel.startswith("3 processes cannot share 2 modules")
    Console().print(processes_table(replace(result, pipeline=None)))
    text = " ".join(capsys.readouterr().out.split())
    assert f"K=2: {two.not_parallel}" in text
    assert "1F1B: left out; it needs a unit of the model and an image of the batch for each process" in text
