"""Units that run again in slices of the batch: the same gradients up to rounding, and the memory of one slice."""

import pickle
from itertools import accumulate, chain

import pytest
import torch
from torch import nn

import localprop
from localprop import localize
from localprop.errors import ConfigError
from localprop.memory.cost import Costs
from localprop.memory.measure import allocated_changes, measured
from localprop.memory.part import Conditions
from localprop.memory.slices import run
from localprop.network.carry import Carry
from localprop.planning.simulation import simulate_step
from localprop.settings.config import OptimConfig
from localprop.settings.recipe import runs_again
from localprop.training.state import TrainingState
from tiny import CLASSES, SIZE, assert_same, batch, build, gradients, split, units_of

IMAGES = 16


def quiet(name):
    """A model without dropout, whose draws depend on the slices."""
    model = build(name)
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def learn(net, amp=False, parts=1):
    """The gradients of a batch, in micro-batches."""
    images, labels = batch(IMAGES)
    for own_images, own_labels in zip(images.chunk(parts), labels.chunk(parts), strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            net.train().backward(own_images, own_labels, seed=0, parts=parts)
    return gradients(net)


def distance(a, b):
    """How far the gradients of two networks are apart, as a share of their length."""
    assert a.keys() == b.keys()
    apart = sum((a[name] - b[name]).double().square().sum() for name in a)
    return float((apart / sum(b[name].double().square().sum() for name in b)).sqrt())


CASES = [
    ("vit", "greedy", {"blocks": "whole/4"}),
    ("vit", "feature-reconstruction", {"blocks": "whole/8", "patch_embed": "whole/2"}),
    ("swin", "feature-reconstruction", {"layers": "whole/2", "patch_embed": "whole/8"}),
    ("mlp", "greedy", {"1": "whole/2", "7": "whole/4"}),
]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("name", "method", "own"), CASES)
def test_gradients_are_those_of_one_piece_up_to_rounding(name, method, own, parts):
    nets = [split(name, 2, method, quiet(name), recompute_units=units) for units in (None, own)]
    plain, sliced = (learn(net, parts=parts) for net in nets)
    assert 0 < distance(sliced, plain) < 1e-5  # not the same bits, so they did run in slices


def test_so_are_those_of_end_to_end_training_with_blocks_that_are_split():
    given = {"method": "end-to-end", "input_size": SIZE, "split_blocks": True}
    own = {"layers": "whole/4", "patch_embed": "whole/16"}
    plain, sliced = (localize(quiet("swin"), 1, recompute_units=units, **given) for units in (None, own))
    assert any(unit.endswith("mlp") for unit in sliced.local_modules[0].units)
    assert 0 < distance(learn(sliced), learn(plain)) < 1e-5


def test_they_are_no_anomaly_to_autograd():
    net = split("vit", 2, "greedy", recompute_units={"blocks": "whole/4"})
    torch.use_deterministic_algorithms(True)  # fills what nobody has written with NaN
    try:
        with torch.autograd.set_detect_anomaly(True):
            assert learn(net)
    finally:
        torch.use_deterministic_algorithms(False)


def test_gradients_of_half_precision_are_added_in_float32():
    model = sequence(Wide(), 64)
    unit, found = localprop.chain(model, SIZE)[1], []
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        output = run(unit, model, x, {}, "whole/32")
    output.float().square().sum().backward()
    found.append([parameter.grad for parameter in model[1].parameters()])
    model.zero_grad()
    for part in x.chunk(32):
        with torch.autocast("cpu", torch.bfloat16):
            output = unit(model, part, {})
        output.float().square().sum().backward()
    found.append([parameter.grad for parameter in model[1].parameters()])
    for a, b in zip(*found, strict=True):
        assert a.dtype == torch.float32
        assert float((a - b).norm() / b.norm()) < 1e-5  # in bfloat16 it would be a hundred times as much


@pytest.mark.parametrize("amp", [False, True])
def test_a_slice_draws_the_same_numbers_again(amp):
    """With dropout: against slices that keep everything."""
    model, unit, found = build("vit").train(), units_of("vit")[1], []
    for sliced in (False, True):
        x = torch.randn(IMAGES, *units_of("vit")[0].shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp, cache_enabled=False):
            if sliced:
                output = run(unit, model, x, {}, "whole/4")
            else:
                output = torch.cat([unit(model, part, {}) for part in x.chunk(4)])
        torch.manual_seed(4)  # what is drawn in between does not matter
        output.float().square().sum().backward()
        own = [model.get_parameter(name) for name in unit.parameters]
        found.append([output.detach(), x.grad, *(parameter.grad for parameter in own)])
        model.zero_grad()
    assert torch.equal(found[0][0], found[1][0])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("case", "parts", "amp"), [(1, 1, False), (2, 1, True), (2, 2, False), (3, 2, True)])
def test_the_predicted_peak_is_that_of_a_real_step(case, parts, amp):
    name, method, own = CASES[case]
    net = split(name, 2, method, recompute_units=own).train()
    config = OptimConfig(amp=amp, micro_batches=parts, sched="none")
    predicted = simulate_step(net, config, IMAGES, SIZE).peak
    state = TrainingState(net, config, 10, torch.device("cpu"))
    for seed in range(2):  # the second has the optimizers' state
        given = [tensor.clone() for tensor in batch(IMAGES)]
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=amp)
        with measured(chain(*state.tensors().values()), torch.device("cpu")) as measurement, autocast:
            carries = Carry.micro_batches([tensor.clone() for tensor in given], parts)
            for number, carry in enumerate(carries, 1):
                state.train_step(carry, seed=seed, last=number == parts)
                del carry
    # Not predicted: what kernels for products of bfloat16 take, and the states of the random numbers of each slice.
    slices = [runs_again(kind) for module in net.local_modules for kind in module.recomputation]
    unknown = sum(slices) * torch.get_rng_state().numel() + (2**20 if amp else 0)
    # Gradients of a weight are added in place, but not those of fake tensors.
    more = max(p.numel() * p.element_size() for p in net.parameters())
    assert -0.01 * measurement.peak - more <= measurement.peak - predicted <= 0.01 * measurement.peak + unknown


class Wide(nn.Module):
    """An MLP with a wide layer inside."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 4096), nn.Linear(4096, 64)

    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(x)))


def test_a_slice_has_its_share_of_the_memory_of_a_unit():
    model, peaks = sequence(Wide(), 64), {}
    units = localprop.chain(model, SIZE)
    for kind in ("whole", "whole/2", "whole/8"):
        cost = Costs(model, units).unit(1, Conditions(4096, recomputation=kind))
        peaks[kind] = cost.backward - cost.gradients
    hidden, features, weight = 4096 * 4096 * 4, 4096 * 64 * 4, 4096 * 64 * 4
    assert peaks["whole"] > 2.9 * hidden  # what GELU reads, what it gives, and the gradient of that
    for count in (2, 8):
        # Beside it the gradients of the output, of the input and of weights.
        assert 0 < peaks[f"whole/{count}"] - peaks["whole"] / count < 2 * features + 3 * weight


def test_the_peak_of_a_real_step_falls_with_the_number_of_slices():
    found = []
    for own in ("whole", "whole/2", "whole/8"):
        net = split("vit", 3, "greedy", recompute_units={"blocks": own}).train()
        images, labels = batch(64)
        changes, _ = allocated_changes(lambda net=net, given=(images, labels): net.backward(*given, seed=0))
        found.append(max(accumulate(changes)))
    assert found[1] < 0.8 * found[0]
    assert found[2] < 0.6 * found[1]


def test_the_last_unit_of_a_module_runs_in_slices_too_but_not_one_that_a_head_reads_ahead():
    again = {"blocks": "whole/2"}
    alone, ahead = (split("vit", 3, "greedy", recompute_units=again, reach=reach) for reach in (0, 1))
    assert alone.local_modules[1].recomputation == ("whole/2", "whole/2")
    assert ahead.local_modules[1].recomputation == ("cheap", "whole/2")
    assert [ahead.recipe.recomputation("blocks.1", False, shared) for shared in (False, True)] == ["whole/2", "cheap"]
    assert split("vit", 3, "greedy", recompute_units={"blocks": "whole"}).local_modules[1].recomputation[-1] == "cheap"
    assert learn(ahead)


def test_an_evaluation_and_frozen_modules_run_in_one_piece():
    plain, sliced = (split("vit", 2, "greedy", recompute_units=own) for own in (None, {"blocks": "whole/8"}))
    images, _ = batch(5)  # which make no eight slices
    with torch.no_grad():
        assert torch.equal(plain.eval()(images), sliced.eval()(images))
    for net in (plain, sliced):
        for parameter in net.local_modules[0].trained():
            parameter.requires_grad_(False)
    frozen = [name for name, p in sliced.named_parameters() if not p.requires_grad]
    assert frozen
    assert learn(sliced).keys() == learn(plain).keys()


class Handing(nn.Module):
    """Hands along a size, a mask with a row for each image and a table that all images share."""

    def __init__(self, mixing=False):
        super().__init__()
        self.mixing = mixing
        self.stem = nn.Linear(48, 24)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24)) for _ in range(3))
        self.head = nn.Linear(24, CLASSES)

    def forward(self, images):
        tokens = images.reshape(images.shape[0], 64, 48)
        count = tokens.shape[0] * 2
        mask = (tokens.detach().mean(2, keepdim=True) > 0).to(tokens.dtype)
        if self.mixing:
            mask = mask.mean(0, keepdim=True)
        table = torch.linspace(0, 1, 24)
        x = self.stem(tokens)
        for block in self.blocks:
            x = x + block((x * mask + table).reshape(count, -1, 24)).reshape(-1, 64, 24)
        return self.head(x.mean(1))


def test_what_units_hand_along_is_sliced_with_the_images():
    units = localprop.chain(Handing(), SIZE)
    kinds = {kind for unit in units for kind in unit.code[True].handed.values()}
    assert kinds == {"count", "rows", "same"}
    assert all(pickle.loads(pickle.dumps(unit.code[True])).handed == unit.code[True].handed for unit in units)
    torch.manual_seed(0)
    model = Handing()
    given = {"input_size": SIZE, "method": "end-to-end"}
    plain, own = (
        learn(localize(model, 1, recompute_units=again, **given))
        for again in (None, {"stem": "whole/2", "blocks": "whole/4"})
        if not model.zero_grad()
    )
    assert 0 < distance(own, plain) < 1e-5


class Mean(nn.Module):
    """Takes the mean of its batch away, though it is no batch norm."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(24, 24))

    def forward(self, x):
        return (x - x.mean(0)) @ self.scale


class Counting(nn.Linear):
    """Counts its calls."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def sequence(middle, width=24):
    return nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(3072, width)), middle, nn.Linear(width, CLASSES))


REFUSED = [
    (lambda: build("cnn"), "0", "unit 0 cannot run in slices of the batch: its batch norm 1 looks at all images"),
    (lambda: sequence(Mean()), "1", "unit 1 cannot run in slices of the batch: it mixes the images of a batch; take"),
    (lambda: sequence(Counting(24, 24)), "1", "it changes its buffer 1.calls with each batch"),
    (lambda: Handing(mixing=True), "blocks.0", "belongs to no single image"),
]


@pytest.mark.parametrize(("model", "unit", "why"), REFUSED)
def test_a_unit_whose_images_are_not_on_their_own_is_refused_in_a_line(model, unit, why):
    model = model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    with pytest.raises(ConfigError, match=why) as error:
        localize(model, 1, "end-to-end", input_size=SIZE, recompute_units={unit: "whole/2"})
    assert "\n" not in str(error.value)
    assert_same(before, model.state_dict())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", ["swin", "vit", "mlp"])
def test_units_of_transformers_may_run_in_slices(name):
    costs = Costs(build(name), localprop.chain(build(name), SIZE, split_blocks=True))
    assert [costs.unsliced(i) for i in range(len(costs.chain))] == [None] * len(costs.chain)


def test_a_batch_that_makes_no_equal_slices_is_told_in_a_line():
    line = "unit blocks.0 is to run in 6 slices, and a batch, or micro-batch, has 8 images, which 6 does not divide; "
    with pytest.raises(ConfigError, match=line + "take whole/4 for it"):
        split("vit", 2, "greedy", batch_size=16, micro_batches=2, recompute_units={"blocks.0": "whole/6"})
    net = split("vit", 2, "greedy", recompute_units={"blocks.0": "whole/4"}).train()
    with pytest.raises(ConfigError, match=r"run in 4 slices, and .* has 7 images, .*; take whole for it"):
        net.backward(*batch(7))


@pytest.mark.parametrize("count", ["1", "0", "", "-2", "02", "2.5", "two", "9999999999"])
def test_a_number_of_slices_is_two_or_more(count):
    with pytest.raises(ConfigError, match=f"recompute_units has blocks.0=whole/{count}; it must be none, cheap, whole"):
        split("vit", 2, "greedy", recompute_units={"blocks.0": f"whole/{count}"})
