"""The finish of a run: the last epochs train the same modules exactly; the real command, on scikit-learn's digits."""

import gc
import hashlib
import json
import signal
import statistics
import weakref

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_states import bits
from localprop.bench.collect import collect
from localprop.bench.record import read_record, write_record
from localprop.bench.reports.labels import setting_labels
from localprop.bench.suite import SuiteRun
from localprop.cli import main
from localprop.division import divide
from localprop.division.exactly import exactly
from localprop.report.losses import read_losses
from localprop.report.results import read_results
from localprop.runs import run
from localprop.runs.experiment import prepare
from localprop.runs.recorded_settings import read_config
from localprop.seeding import derive_seed
from localprop.settings.config import OptimConfig
from localprop.training.checkpoints.loading import load_checkpoint
from localprop.training.gauge import Gauge
from localprop.training.outputs import Outputs
from localprop.training.state import TrainingState
from localprop.training.trainer import Trainer
from one_graph import one_graph
from stopped import stop_at
from tape import TapePool
from tiny import assert_same, batch, gradients, split

CPU = torch.device("cpu")
LIVELY = {"clip_grad": 1.0, "model_ema": True, "model_ema_decay": 0.9}
SMALL = [
    *["--model-kwargs", "patch_size=4", "window_size=2", "embed_dim=12", "depths=(1,1)", "num_heads=(1,2)"],
    *["--min-depth", "0", "--batch-size", "512", "--device", "cpu", "--cuts", "patch_embed", "layers.0"],
    *["--reach", "1", "--drop-path", "0.2", "--mixup", "0.2", "--clip-grad", "1", "--kinetic", "0.1"],
    *["--model-ema", "--model-ema-decay", "0.9", "--checkpoint-hist", "9"],
]
PER_EPOCH, SWITCH, STEPS = 2, 4, 8  # steps of an epoch, those before the finish, and all


def train(output, *flags, epochs=4, finish=("--finish", "0.5")):
    words = [*SMALL, *finish, "--epochs", str(epochs), "--output", str(output), "--experiment", "run"]
    return main(["train", *words, *flags])


@pytest.fixture
def bare(monkeypatch):
    """Runs whose memory nobody predicts or measures, and whose curves nobody draws: that takes longer than the rest."""
    monkeypatch.setattr(run, "predict", lambda *_: (None, []))
    monkeypatch.setattr(Gauge, "_due", lambda *_: False)
    monkeypatch.setattr(Outputs, "_draw", lambda _: None)


def parts_at(folder, step):
    return load_checkpoint(folder / "checkpoints" / f"step-{step:08d}").parts


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run."""
    output = tmp_path_factory.mktemp("finished")
    assert train(output) == 0
    return output / "run"


def assert_same_run(one, other):
    """Two runs came to the same, bit for bit: weights, the last checkpoint, losses and scores."""
    assert_same(*(load_file(folder / "model.safetensors") for folder in (one, other)))
    assert bits(parts_at(one, STEPS)) == bits(parts_at(other, STEPS))
    rows = [read_results(folder / "results.csv") for folder in (one, other)]
    told = [[(r.epoch, r.step, r.lr, str(r.train_losses), r.heads, r.network) for r in own] for own in rows]
    assert told[0] == told[1]
    losses = [[str((row[0], *row[3:])) for row in read_losses(folder / "losses.csv")] for folder in (one, other)]
    assert losses[0] == losses[1]


def test_a_run_says_what_its_last_epochs_were(finished, capsys):
    rows = read_results(finished / "results.csv")
    assert [[loss == loss for loss in row.train_losses] for row in rows] == [[True] * 3] * 2 + [
        [False, False, True]
    ] * 2
    assert [[score is None for score in row.heads] for row in rows] == [[False] * 3] * 2 + [[True, True, False]] * 2
    assert rows[-1].predicted_memory == pytest.approx(rows[-1].peak_memory, rel=0.03)
    assert json.loads((finished / "run.json").read_text())["finish"] == {"after_step": SWITCH, "lr": 0.0015}
    auxiliary = [[bool(part["auxiliary"]) for part in parts_at(finished, step).values()] for step in (SWITCH, STEPS)]
    assert auxiliary == [[True] * 3, [False] * 3]  # the head that reads ahead is the last module's
    assert main(["eval", str(finished), "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == pytest.approx(rows[-1].headline, abs=1e-3)
    assert main(["export", str(finished)]) == 0


def test_a_suites_record_of_it_has_no_scores_of_modules_and_the_mean_time(finished, tmp_path):
    record = collect(finished, "own", SuiteRun("own", {}, read_config(finished)), 1)
    write_record(tmp_path / "own.json", record)
    record = read_record(tmp_path / "own.json")
    assert record.module_scores == [None, None, read_results(finished / "results.csv")[-1].headline]
    losses = read_losses(finished / "losses.csv")
    before, after = (statistics.median(row[1] for row in part) for part in (losses[:SWITCH], losses[SWITCH:]))
    assert record.cost["seconds_per_step"] == pytest.approx((before + after) / 2)
    assert [loss is None for loss in record.result["curve"]["loss"][-1]] == [True, True, False]
    plain = record.config | {"finish": 0.0, "modules": 3}
    labels = setting_labels([plain, plain | {"finish": 0.5}, plain | {"finish": 0.5, "finish_lr": 0.01}], ())
    assert [short for _, short in labels] == ["K=3", "K=3, finish 0.5", "K=3, finish 0.5, finish lr 0.01"]


@pytest.mark.usefixtures("bare")
def test_the_epochs_before_it_are_those_of_a_run_that_ends_there(finished, tmp_path):
    assert train(tmp_path, epochs=2, finish=()) == 0
    assert bits(parts_at(tmp_path / "run", SWITCH)) == bits(parts_at(finished, SWITCH))


def test_it_is_exact_training_from_the_weights_that_it_finds(finished):
    """Step by step, with an end-to-end network, fresh moments and a schedule of two epochs from half of the rate."""
    config, before, after = read_config(finished), parts_at(finished, SWITCH), parts_at(finished, STEPS)
    experiment = prepare(config)
    data, backbone = experiment.data, experiment.backbone
    cuts, size = ("patch_embed", "layers.0"), experiment.input_size
    options = {"kinetic": 0.1, "min_depth": 0, "recompute": True, "input_size": size, "task": data.task}
    net = divide.localize(backbone, 3, "end-to-end", cuts=cuts, **options).train()
    state = TrainingState(net, OptimConfig(epochs=2, batch_size=512, lr=1.5e-3, clip_grad=1.0), PER_EPOCH, CPU)
    for part in before.values():
        backbone.load_state_dict(part["backbone"], strict=False)
    average = {name: tensor for part in before.values() for name, tensor in part["ema"].items()}
    for epoch in (2, 3):
        for images, labels in data.train_batches(epoch, 512, CPU, 0):
            state.train_step([images, labels], derive_seed(42, "step", SWITCH + state.step))
            average = {name: tensor.lerp(backbone.state_dict()[name], 0.1) for name, tensor in average.items()}
    for name, part in state.parts().items():
        assert bits(part) == bits({key: value for key, value in after[name].items() if key != "ema"})
        torch.testing.assert_close(after[name]["ema"], {key: average[key] for key in after[name]["ema"]})


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("step", [SWITCH, SWITCH + 1])
def test_a_signal_saves_and_the_resumed_run_equals_the_uninterrupted(finished, tmp_path, monkeypatch, step):
    stop_at(monkeypatch, step, PER_EPOCH)
    assert train(tmp_path) == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.usefixtures("bare")
def test_a_run_that_stops_where_it_begins_goes_on_as_if_it_had_not(finished, tmp_path, capsys):
    assert train(tmp_path, "--steps", str(SWITCH)) == 0
    folder = tmp_path / "run"
    assert None not in read_results(folder / "results.csv")[-1].heads
    assert main(["train", "--resume", str(folder)]) == 0
    assert f"checkpoints/step-{SWITCH:08d}, at epoch 3, batch 1" in "".join(capsys.readouterr().out.split("\n"))
    assert_same_run(folder, finished)


@pytest.mark.usefixtures("bare")
def test_a_checkpoint_that_does_not_fit_leaves_nothing_behind_and_the_one_before_is_taken(finished, tmp_path, capsys):
    assert train(tmp_path, "--steps", "6") == 0
    checkpoints = tmp_path / "run" / "checkpoints"
    wrong, sums = checkpoints / "step-00000006", checkpoints / "step-00000006" / "SHA256SUMS"
    # The part before it, with moments of the finish, has been taken over by the time this one is found to be wrong.
    content = (checkpoints / f"step-{SWITCH:08d}" / "module-1.safetensors").read_bytes()
    known = hashlib.sha256((wrong / "module-1.safetensors").read_bytes()).hexdigest()
    (wrong / "module-1.safetensors").write_bytes(content)
    sums.write_text(sums.read_text().replace(known, hashlib.sha256(content).hexdigest()))
    for path in checkpoints.glob("step-00000005*"):
        path.rename(tmp_path / path.name)
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert "auxiliary nets hold other weights" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.usefixtures("bare")
def test_auxiliary_nets_and_moments_are_free_in_it(tmp_path, monkeypatch):
    seen, left = [], []
    before = Trainer._train_epoch

    def watched(self, progress):
        before(self, progress)
        gc.disable()  # what is free must be so by the time the finish begins, not some time later
        if self.position.epoch == 1:
            nets = [p for module in self.state.net.local_modules for p in module.local_loss.parameters()]
            seen.extend(weakref.ref(t) for t in (*nets, *self.state.tensors()["optimizer"]))
        elif self.position.epoch == 2:
            left.extend(ref for ref in seen if ref() is not None)

    monkeypatch.setattr(Trainer, "_train_epoch", watched)
    try:
        assert train(tmp_path) == 0
    finally:
        gc.enable()
    assert len(seen) > 50
    assert left == []


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_its_network_has_the_gradients_of_one_graph(name):
    images, labels = batch()
    other, net = (split(name, reach=reach, kinetic=0.1, recompute=True).train() for reach in (0, 1))
    one_graph(exactly(other), images, labels, seed=3)
    own = exactly(net)
    assert [module.units for module in own.local_modules] == [module.units for module in net.local_modules]
    own.backward(images, labels, seed=3)
    whole, found = gradients(other), gradients(own)
    assert found.keys() == {n for n, _ in own.named_parameters()} == {n for n in whole if n.startswith("backbone.")}
    assert_same({n: whole[n] for n in found}, found)


def test_what_runs_again_is_what_the_recipe_says():
    again = {"blocks": "whole", "blocks.3": "none"}
    net = split("vit", reach=1, recompute=True, recompute_units=again)
    assert net.local_modules[1].recomputation[0] == "cheap"  # it is read ahead
    assert [module.recomputation[-1] for module in exactly(net).local_modules] == ["cheap", "cheap", "cheap"]
    assert exactly(net).local_modules[1].recomputation[0] == "whole"


def test_what_is_frozen_stays_so():
    net = split("resnet", freeze_modules=1).train()
    own = exactly(net)
    assert [module.frozen for module in own.local_modules] == [True, False, False]
    before = {name: buffer.clone() for name, buffer in net.backbone.named_buffers()}
    own.train().backward(*batch(), seed=1)
    changed = [name for name, buffer in net.backbone.named_buffers() if not torch.equal(before[name], buffer)]
    assert changed
    assert all(name.startswith(("layer2", "layer3", "layer4")) for name in changed)


@pytest.mark.parametrize("settings", [{"amp": True}, {"amp": True, "amp_dtype": "float16", "lr": 1e-4}, LIVELY])
def test_both_parts_are_captured_anew_with_the_bits_of_eager_steps(settings):
    results = []
    for captured in (False, True):
        net, pools = split("resnet", decoder="pixel-shuffle").train(), [TapePool(), TapePool()]
        state = TrainingState(net, OptimConfig(**settings), 10, CPU, delayed=True)
        for pool in pools:
            if captured:
                state.capture(pool, pytest.fail)
            half = settings.get("amp") and "amp_dtype" not in settings
            for _ in range(4):
                with torch.autocast("cpu", torch.bfloat16, enabled=bool(half)):
                    state.train_step(list(batch(seed=state.step)), seed=state.step)
            given = {"delayed": True, "first": state.step, "ema": state.ema}
            last, state = state, TrainingState(exactly(net), OptimConfig(**settings), 10, CPU, **given)
        results.append(last.parts())
        assert [bool(pool.captures) for pool in pools] == [captured] * 2
    assert bits(results[0]) == bits(results[1])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--finish", "0.1"],
            "--finish is 0.1, which of --epochs 4 is none; choose another --finish, or",
        ),
        (["--finish", "0.9"], "--finish is 0.9, which of --epochs 4 is all"),
        (["--finish", "1"], "--finish is 1.0; it must be at least 0 and below 1"),
        (["--finish", "0", "--finish-lr", "0.1"], "--finish-lr is 0.1, but there is no finish; add --finish 0.1"),
        (["--finish-lr", "-1"], "--finish-lr is -1.0; it must be at least 0"),
        (["--warmup-epochs", "3"], "--warmup-epochs is 3, longer than the 2 before --finish"),
        (["--method", "end-to-end", "--reach", "0"], "--finish is 0.5, but --method end-to-end is exact"),
        (["--parallel", "modules", "--nproc", "2"], "those of --finish wait for each other; choose --parallel data"),
    ],
)
def test_what_cannot_be_finished_is_refused_in_a_line(tmp_path, capsys, flags, words):
    assert train(tmp_path, *flags) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_one_module_has_no_finish(tmp_path, capsys):
    assert main(["train", "--finish", "0.5", "--method", "greedy", "--modules", "1"]) == 2
    assert "--finish is 0.5, but there is one module; leave --finish out" in capsys.readouterr().err
