"""NaN and infinity: no gradient that is not finite is stepped, no weight that is not finite is saved or loaded."""

import json
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from localprop import localize
from localprop.cli import main
from localprop.errors import NonFiniteGradientError, NonFiniteLossError, NonFiniteWeightError
from localprop.network.network import LocalNetwork
from localprop.settings.config import OptimConfig
from localprop.training.checkpoints.loading import load_checkpoint, newest_checkpoint
from localprop.training.checkpoints.saving import save_checkpoint
from localprop.training.state import TrainingState
from tiny import SIZE, batch, split

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")
RUN = [
    *["--model-kwargs", "patch_size=4", "window_size=2", "embed_dim=12", "depths=(1,1)", "num_heads=(1,2)"],
    *["--min-depth", "0", "--modules", "2", "--batch-size", "256", "--epochs", "2", "--device", "cpu"],
    *["--experiment", "run", "--checkpoint-hist", "9"],
]


def state_of(net=None, **settings):
    return TrainingState((net or split("mlp", method="greedy")).train(), OptimConfig(**settings), 10, CPU)


def weights(net):
    return [[p.detach().clone() for p in module.parameters()] for module in net.local_modules]


def changed(before, net):
    """Whether each module's weights differ from `before`."""
    return [
        any(not torch.equal(a, b) for a, b in zip(own, module.parameters(), strict=True))
        for own, module in zip(before, net.local_modules, strict=True)
    ]


def poison(state, k, value, name=None):
    """Makes one gradient of module k hold `value`; gives what ends that."""
    named = dict(state.net.local_modules[k].named_parameters())
    parameter = named[name or list(named)[1]]
    return parameter.register_hook(lambda gradient: torch.where(gradient == gradient.flatten()[0], value, gradient))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_gradient_that_is_not_finite_is_not_stepped(value, clip):
    state, healthy = (state_of(clip_grad=clip) for _ in range(2))
    before = weights(state.net)
    name = list(dict(state.net.local_modules[1].named_parameters()))[2]
    handle = poison(state, 1, value, name)
    with pytest.raises(NonFiniteGradientError) as caught:
        state.train_step(list(batch()), seed=0)
    line = str(caught.value)
    assert re.search(rf"gradient of {re.escape(name)} in module 2 of 3 \(.*\) is not finite at step 1", line)
    assert "\n" not in line
    assert changed(before, state.net) == [True, False, False]
    assert all(parameter.grad is None for parameter in state.net.parameters())
    handle.remove()
    healthy.train_step(list(batch()), seed=0)  # its first module has had one step more by now, as that of `state`
    state.train_step(list(batch()), seed=0)
    assert all(parameter.isfinite().all() for parameter in state.net.parameters())


@pytest.mark.parametrize("parts", [1, 2])
def test_a_loss_that_is_not_finite_leaves_a_state_that_goes_on(parts):
    state = state_of(micro_batches=parts)
    before = weights(state.net)
    images, labels = batch()
    with pytest.raises(NonFiniteLossError, match=r"the loss of module 1 of 3 .* is nan at step 1"):
        state.train_step([images * NAN, labels], seed=0, last=parts == 1)
    assert changed(before, state.net) == [False] * 3
    for part in range(parts):
        state.train_step(list(batch()), seed=0, last=part + 1 == parts)
    assert all(parameter.isfinite().all() for parameter in state.net.parameters())
    assert changed(before, state.net) == [True] * 3


def test_large_finite_gradients_are_clipped_to_their_norm():
    class Steep(torch.autograd.Function):
        """The same, with a gradient 1e30 times as large: its norm is no float32."""

        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * 1e30

    class Layer(nn.Module):
        def forward(self, x):
            return Steep.apply(x)

    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 5), Layer())
    state, norms = state_of(localize(model, 1, "end-to-end", input_size=SIZE), clip_grad=0.5), []

    def look(*_):
        gradients = [parameter.grad.double().flatten() for parameter in model.parameters()]
        norms.append(torch.cat(gradients).norm())

    state.optimizers[0].register_step_pre_hook(look)
    state.train_step(list(batch()), seed=0)
    assert norms == [pytest.approx(0.5, rel=1e-4)]


def test_clipping_is_that_of_a_plain_loop():
    state, net = state_of(clip_grad=0.05), split("mlp", method="greedy").train()
    plain = state_of(net)
    for seed in range(3):
        state.train_step(list(batch(seed=seed)), seed)
        images, labels = batch(seed=seed)

        def clip(k, loss, optimizers=plain.optimizers):
            nn.utils.clip_grad_norm_(net.local_modules[k].parameters(), 0.05)
            optimizers[k].step()
            optimizers[k].zero_grad()

        for scheduler in plain.schedulers:
            scheduler.step_update(seed)
        net.backward(images, labels, seed=seed, after_module=clip)
    for a, b in zip(state.net.parameters(), net.parameters(), strict=True):
        assert torch.equal(a, b)


def test_float16_skips_a_step_halves_the_scale_and_ends_below_1():
    state = state_of(amp=True, amp_dtype="float16")
    before, scale = weights(state.net), state.scalers[1].get_scale()
    handle = poison(state, 1, INF)
    state.train_step(list(batch()), seed=0)
    assert changed(before, state.net) == [True, False, True]
    assert [scaler.get_scale() for scaler in state.scalers] == [scale, scale / 2, scale]
    for _ in range(15):
        state.train_step(list(batch()), seed=0)
    assert state.scalers[1].get_scale() == 1
    with pytest.raises(NonFiniteGradientError, match=r"module 2 of 3 .* loss scale"):
        state.train_step(list(batch()), seed=0)
    assert state.scalers[1].get_scale() == 0.5
    assert changed(before, state.net)[1] is False
    handle.remove()
    state.train_step(list(batch()), seed=0)
    assert changed(before, state.net)[1]
    assert all(parameter.isfinite().all() for parameter in state.net.parameters())


def test_float16_skips_the_step_of_a_loss_that_is_not_finite():
    state = state_of(amp=True, amp_dtype="float16")
    before = weights(state.net)
    images, labels = batch()
    state.train_step([images * NAN, labels], seed=0)
    assert changed(before, state.net) == [False] * 3
    assert [scaler.get_scale() for scaler in state.scalers] == [2.0**15] * 3


@pytest.mark.parametrize("precision", [{}, {"amp": True, "amp_dtype": "float16"}])
def test_replicas_decide_alike(precision):
    states = [state_of(**precision) for _ in range(2)]
    barrier, mailbox, problems = threading.Barrier(2), [None, None], [None, None]

    def exchange(replica):
        def average(gradients):
            mailbox[replica] = [gradient.clone() for gradient in gradients]
            barrier.wait(60)
            means = [torch.stack(both).mean(0) for both in zip(*mailbox, strict=True)]
            barrier.wait(60)
            for gradient, mean in zip(gradients, means, strict=True):
                gradient.copy_(mean)

        return average

    def work(replica):
        try:
            for step in range(2):
                states[replica].train_step(list(batch(seed=2 * step + replica)), seed=0)
        except NonFiniteLossError as error:
            problems[replica] = str(error)

    for replica, state in enumerate(states):
        state.average = exchange(replica)
    poison(states[0], 1, NAN)
    threads = [threading.Thread(target=work, args=[replica]) for replica in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [bool(problem) for problem in problems] == [not precision] * 2
    for a, b in zip(*(state.net.parameters() for state in states), strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()
    scales = [[scaler.get_scale() for scaler in state.scalers if scaler] for state in states]
    assert scales[0] == scales[1]
    assert len(set(scales[0])) == (2 if precision else 0)


class Masked(nn.Module):
    """Has a mask of -inf, as causal attention does, and statistics."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(3072, 16), nn.BatchNorm1d(16))
        self.register_buffer("mask", torch.where(torch.arange(16) > 8, -INF, 0.0))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.features(x) + self.mask.clamp(min=0))


def test_only_buffers_that_were_infinite_when_built_are_saved_so():
    net = localize(Masked(), 1, "greedy", input_size=SIZE)
    state = state_of(net, model_ema=True)
    state.train_step(list(batch()), seed=0)
    parts = state.parts()
    assert state.flaw(parts) is None
    assert not parts["module-0"]["backbone"]["mask"].isfinite().all()
    state.steps.finite.require(state.evaluated.state_dict())
    buffer = net.backbone.features[2].running_var
    buffer[3] = INF
    for check in (state.parts, lambda: state.steps.finite.require(net.backbone.state_dict())):
        with pytest.raises(NonFiniteWeightError, match=r"features\.2\.running_var .*not finite"):
            check()


@pytest.mark.parametrize(
    ("place", "said"),
    [("backbone", r"head\.\S+ in module 3 of 3"), ("auxiliary", "auxiliary .* module 1 of 3"), ("ema", "ema head")],
)
def test_no_checkpoint_is_made_of_weights_that_are_not_finite(place, said):
    state = state_of(split("vit"), model_ema=True)
    model = {
        "backbone": state.net.backbone.head,
        "auxiliary": state.net.local_modules[0].local_loss,
        "ema": state.ema.module.head,
    }[place]
    with torch.no_grad():
        next(model.parameters()).flatten()[-1] = NAN
    with pytest.raises(NonFiniteWeightError, match=said):
        state.parts()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The output folder of a run, with a checkpoint after each of two epochs."""
    output = tmp_path_factory.mktemp("finished")
    assert main(["train", *RUN, "--output", str(output)]) == 0
    return output


def steps_of(output):
    return sorted(path.name for path in (output / "run" / "checkpoints").iterdir())


def test_a_run_with_a_bad_gradient_ends_with_a_line_and_can_be_resumed(finished, tmp_path, monkeypatch, capsys):
    run_phase = LocalNetwork.run_phase

    def spoiled(self, phase, carry, *rest):
        result, k = run_phase(self, phase, carry, *rest), phase.module
        if k == 1 and type(carry.features) is torch.Tensor:  # not a fake one, of the prediction
            calls.append(k)
        if len(calls) == 7 and k == 1:
            next(p for p in self.local_modules[1].parameters() if p.grad is not None).grad[0] = NAN
        return result

    with monkeypatch.context() as patch:
        calls = []
        patch.setattr(LocalNetwork, "run_phase", spoiled)
        assert main(["train", *RUN, "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"localprop: the gradient of \S+ in module 2 of 2 \(.*\) is not finite at step 7.*\n", error)
    assert steps_of(tmp_path) == ["step-00000005"]
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert main(["train", "--resume", str(tmp_path / "run"), "--device", "cpu"]) == 0
    files = [load_file(output / "run" / "model.safetensors") for output in (finished, tmp_path)]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def spoil(folder: Path, name: str) -> None:
    """Puts a NaN into a checkpoint, as one was saved before weights were checked."""
    checkpoint = load_checkpoint(folder / "checkpoints" / name)
    tensor = checkpoint.parts["module-1"]["backbone"]["head.fc.weight"]
    tensor[0, 0] = NAN
    save_checkpoint(folder / "checkpoints", checkpoint.step, checkpoint.parts, checkpoint.meta, 9)


def test_a_checkpoint_with_bad_weights_is_passed_over_and_the_line_is_true(finished, tmp_path, capsys):
    shutil.copytree(finished / "run", tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    spoil(tmp_path / "run", "step-00000010")
    said = r"step-00000010: head\.fc\.weight in module 2 of 2 \(.*\) is not finite"
    for command in ("eval", "export"):
        assert main([command, str(tmp_path / "run")]) == 2
        assert re.search(r"step-00000010: head\.fc\.weight is not finite", capsys.readouterr().err)
    assert main(["train", "--resume", str(tmp_path / "run"), "--device", "cpu"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(said, out)
    assert re.search(r"resumed from \S+step-00000005", out)
    files = [load_file(output / "run" / "model.safetensors") for output in (finished, tmp_path)]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    spoil(tmp_path / "run", "step-00000005")  # saving it removes the later one
    assert main(["train", "--resume", str(tmp_path / "run"), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "has no valid checkpoint" in error
    assert "is not finite" in error
    assert "not touched" not in error
    assert newest_checkpoint(tmp_path / "run" / "checkpoints")[0].step == 5  # nothing was written


@pytest.mark.parametrize("command", ["eval", "export"])
def test_a_model_file_with_bad_weights_is_neither_evaluated_nor_exported(finished, tmp_path, command, capsys):
    shutil.copytree(finished / "run", tmp_path / "run")
    path = tmp_path / "run" / "model.safetensors"
    content = load_file(path)
    content["head.fc.bias"][1] = INF
    save_file(content, path)
    assert main([command, str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    assert re.fullmatch(r"localprop: \S+model\.safetensors: head\.fc\.bias is not finite.*\n", captured.err)
    assert captured.out == ""
    assert not (tmp_path / "run" / "export").exists()
    assert json.loads((tmp_path / "run" / "run.json").read_text())
