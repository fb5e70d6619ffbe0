"""A step that is masked on the device: what is not finite is not stepped, and is reported when its numbers arrive."""

import re

import pytest
import torch

from localprop.cli import main
from localprop.settings.config import OptimConfig
from localprop.training.state import TrainingState
from localprop.training.stepping.delayed import Delayed
from tiny import batch, split

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


def state_of(delayed=True, **settings):
    return TrainingState(split("mlp", method="greedy").train(), OptimConfig(**settings), 10, CPU, delayed=delayed)


def step(state, seed=0, images=None):
    """One step; gives what `problem` needs."""
    own = list(batch(seed=seed))
    if images is not None:
        own[0] = images
    losses = state.train_step(own, seed)
    return losses.tolist(), state.mask.flags.tolist(), state.step


def content(state, k):
    parameters = [p.detach().clone() for p in state.net.local_modules[k].parameters()]
    return [*parameters, *(t.clone() for p in state.optimizers[k].state.values() for t in p.values())]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def poison(state, k, value, name):
    parameter = dict(state.net.local_modules[k].named_parameters())[name]
    return parameter.register_hook(lambda gradient: torch.where(gradient == gradient.flatten()[0], value, gradient))


@pytest.mark.parametrize("opt", ["adamw", "adam", "momentum", "adagrad"])  # Adagrad in later versions of torch
def test_a_masked_step_trains_like_a_checked_one(opt):
    settings = {"opt": opt, "clip_grad": 0.5, "model_ema": True, "model_ema_decay": 0.9}
    looked, masked = (state_of(delayed, **settings) for delayed in (False, True))
    assert looked.mask is None
    if masked.mask is None:
        pytest.skip(f"{opt} takes no mask in this version of torch")
    for seed in range(4):
        looked.train_step(list(batch(seed=seed)), seed)
        assert masked.problem(*step(masked, seed)) is None
    assert masked.lr == looked.lr
    # Learning rates of a device are float32.
    for a, b in zip(looked.net.parameters(), masked.net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(looked.ema.parameters(), masked.ema.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_bad_gradient_masks_its_module_later_ones_and_all_later_steps(value, clip):
    state = state_of(clip_grad=clip, model_ema=True, model_ema_decay=0.5)
    names = list(dict(state.net.local_modules[1].named_parameters()))
    assert state.problem(*step(state)) is None
    before = [content(state, k) for k in range(3)]
    average = [p.clone() for p in state.ema.parameters()]
    handle = poison(state, 1, value, names[2])
    failed = step(state, 1)
    assert failed[1] == [0, 1, 0]
    stepped = content(state, 0)
    assert not same(before[0], stepped)
    handle.remove()
    later = step(state, 2)
    assert later[1] == failed[1]
    assert same(content(state, 0), stepped)
    assert [same(before[k], content(state, k)) for k in (1, 2)] == [True, True]
    assert same(average, [p.clone() for p in state.ema.parameters()])
    line = str(state.problem(*failed))
    assert re.search(rf"gradient of {re.escape(names[2])} in module 2 of 3 \(.*\) is not finite at step 2, its", line)
    assert state.problem(*step(state, 3)) is None  # a state that has reported its error can be trained again
    assert not same(before[1], content(state, 1))


@pytest.mark.parametrize("parts", [1, 2])
def test_a_bad_loss_names_the_first_module(parts):
    state = state_of(micro_batches=parts)
    before = [content(state, k) for k in range(3)]
    images, labels = batch()
    losses = [
        state.train_step([images * (NAN if not part else 1), labels], 0, part + 1 == parts) for part in range(parts)
    ]
    line = str(state.problem(torch.stack(losses).mean(0).tolist(), state.mask.flags.tolist(), 1))
    assert re.search(r"the loss of module 1 of 3 .* is nan at step 1", line)
    assert [len(content(state, k)) for k in range(3)] != [len(own) for own in before]  # optimizers have their state
    for k, own in enumerate(before):
        assert same(own, list(state.net.local_modules[k].parameters()))


def test_a_bad_loss_of_an_early_micro_batch_names_its_own_module():
    state = state_of(micro_batches=2)
    later = state.net.backbone[4]  # in the second module
    losses = []
    for part in range(2):
        hook = later.register_forward_hook(lambda _, inputs, output, factor=1 if part else NAN: output * factor)
        losses.append(state.train_step(list(batch(seed=part)), part, part == 1))
        hook.remove()
    line = str(state.problem(torch.stack(losses).mean(0).tolist(), state.mask.flags.tolist(), 1))
    assert re.search(r"the loss of module 2 of 3 .* is nan at step 1", line)


def test_the_average_leaves_out_what_another_process_trains(monkeypatch):
    net = split("mlp", method="greedy").train()
    state = TrainingState(net, OptimConfig(model_ema=True), 10, CPU, range(1, 2), delayed=True)
    averaged, lerp = [], torch._foreach_lerp_

    def note(own, *others):
        averaged.extend(own)
        return lerp(own, *others)

    monkeypatch.setattr(torch, "_foreach_lerp_", note)
    state.update_average()
    assert len(averaged) == len(net.shares()[1])
    # Tensors without memory are on a device of their own, and an operation of CUDA with one of them fails.
    assert not any(tensor.is_meta for tensor in averaged)


def test_a_loss_of_another_process_comes_first():
    net = split("mlp", method="greedy").train()
    state = TrainingState(net, OptimConfig(), 10, CPU, range(1, 3), delayed=True)
    flags = [1.0, 1.0]
    assert "the loss of module 1 of 3" in str(state.problem([NAN, NAN, NAN], flags, 4))
    assert "the loss of module 2 of 3" in str(state.problem([1.0, INF, NAN], flags, 4))
    assert "at step 4" in str(state.problem([1.0, INF, NAN], flags, 4))


def test_large_finite_gradients_are_clipped_to_their_norm():
    state = state_of(clip_grad=0.5)
    hooks = [p.register_hook(lambda g: g * 1e30) for p in state.net.local_modules[0].parameters()]
    norms = []

    def look(*_):
        gradients = [p.grad.double().flatten() for p in state.net.local_modules[0].parameters()]
        norms.append(float(torch.cat(gradients).norm()))

    state.optimizers[0].register_step_pre_hook(look)
    assert state.problem(*step(state)) is None
    assert norms == [pytest.approx(0.5, rel=1e-4)]
    for hook in hooks:
        hook.remove()


def test_float16_skips_a_step_halves_the_scale_and_fails_below_1():
    state = state_of(amp=True, amp_dtype="float16")
    name = list(dict(state.net.local_modules[1].named_parameters()))[1]
    scale = state.scalers[1].get_scale()
    weights = [[p.detach().clone() for p in module.parameters()] for module in state.net.local_modules]
    handle = poison(state, 1, INF, name)

    def changed():
        own = [list(module.parameters()) for module in state.net.local_modules]
        return [not same(a, b) for a, b in zip(weights, own, strict=True)]

    assert state.problem(*step(state)) is None
    assert changed() == [True, False, True]
    assert [scaler.get_scale() for scaler in state.scalers] == [scale, scale / 2, scale]
    for _ in range(15):
        assert state.problem(*step(state)) is None
    assert state.scalers[1].get_scale() == 1
    line = str(state.problem(*step(state)))
    assert re.search(rf"gradient of {re.escape(name)} in module 2 of 3 .* loss scale of 1", line)
    assert changed()[1] is False
    handle.remove()
    assert state.problem(*step(state)) is None
    assert changed()[1]


def test_momentum_begins_at_zero_where_the_first_step_is_skipped():
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # uninitialized memory is then NaN
    try:
        state = state_of(amp=True, amp_dtype="float16", opt="momentum", lr=1e-4)
        handle = poison(state, 1, INF, list(dict(state.net.local_modules[1].named_parameters()))[1])
        assert state.problem(*step(state)) is None
        handle.remove()
        for seed in (1, 2):
            assert state.problem(*step(state, seed)) is None
        assert all(parameter.isfinite().all() for parameter in state.net.parameters())
    finally:
        torch.use_deterministic_algorithms(deterministic)


def test_numbers_come_in_order_and_few_are_on_their_way():
    numbers, came = Delayed(CPU, 2), []
    for number in range(5):
        numbers.add(number, torch.tensor([float(number)]))
        came.append(list(numbers.arrived()))
    assert came == [[], [], [(0, [0.0])], [(1, [1.0])], [(2, [2.0])]]
    assert list(numbers.rest()) == [(3, [3.0]), (4, [4.0])]


RUN = [
    *["train", "--model-kwargs", "patch_size=4", "window_size=2", "embed_dim=12", "depths=(1,1)", "num_heads=(1,2)"],
    *["--min-depth", "0", "--modules", "2", "--batch-size", "256", "--epochs", "2", "--device", "cpu"],
    *["--experiment", "run", "--checkpoint-steps", "2", "--checkpoint-hist", "9"],
]


@pytest.fixture
def delayed(monkeypatch, tmp_path):
    """Runs on the CPU report their steps late, as runs on CUDA do."""
    monkeypatch.chdir(tmp_path)
    build = TrainingState.__init__

    def late(self, *args, **kwargs):
        build(self, *args, **kwargs, delayed=True)

    monkeypatch.setattr(TrainingState, "__init__", late)


def test_a_run_writes_every_step_down(delayed, tmp_path, capsys):
    assert main(RUN) == 0
    losses = (tmp_path / "runs/run/losses.csv").read_text().splitlines()
    results = (tmp_path / "runs/run/results.csv").read_text().splitlines()
    steps = int(results[-1].split(",")[1])
    assert [int(line.split(",")[0]) for line in losses[1:]] == list(range(1, steps + 1))
    assert main(["train", "--resume", "runs/run"]) == 0


def test_a_run_that_is_stopped_and_resumed_equals_one_that_is_not(delayed, tmp_path):
    assert main([*RUN, "--model-ema"]) == 0
    assert main([*RUN, "--model-ema", "--output", "other", "--steps", "3"]) == 0
    assert main(["train", "--resume", "other/run"]) == 0
    for name in ("model.safetensors",):
        assert (tmp_path / "runs/run" / name).read_bytes() == (tmp_path / "other/run" / name).read_bytes()


def test_a_run_ends_with_the_line_of_the_step_that_failed(delayed, tmp_path, monkeypatch, capsys):
    train_step = TrainingState.train_step

    def fail(self, batch, seed, last=True):
        if self.step == 3:
            batch.features *= NAN
        return train_step(self, batch, seed, last)

    monkeypatch.setattr(TrainingState, "train_step", fail)
    assert main(RUN) == 2
    error = capsys.readouterr().err
    assert re.search(r"the loss of module 1 of 2 .* is nan at step 4", error)
    assert "Traceback" not in error
    assert max(int(path.name.split("-")[-1]) for path in (tmp_path / "runs/run/checkpoints").iterdir()) == 2
