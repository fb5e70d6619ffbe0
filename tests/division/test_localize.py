"""Dividing a model: defaults, cuts, stages, balance, and every mistake in one line."""

import copy

import pytest
import torch
from timm.loss import SoftTargetCrossEntropy
from torch import nn
from torch.nn import functional as F

from localprop import localize
from localprop.decoders.pixel_shuffle import PixelShuffleDecoder
from localprop.errors import ChainError, ConfigError
from localprop.heads.mlp import MlpHead
from localprop.methods.feature_reconstruction import FeatureReconstruction
from localprop.planning.simulation import simulate_step
from localprop.settings.config import OptimConfig
from localprop.tracing.chains import chain
from tiny import SIZE, batch, build, module_peaks, split, traced_once, units_of


def units(net):
    return [module.units for module in net.local_modules]


def names_of(name):
    return [unit.name for unit in units_of(name)]


def test_defaults():
    net = localize(build("vit"))
    assert len(net.local_modules) == 4
    loss = net.local_modules[1].local_loss
    assert isinstance(loss, FeatureReconstruction)
    assert isinstance(loss.decoder, PixelShuffleDecoder)
    assert isinstance(loss.head, MlpHead)
    assert units(localize(build("vit"), method="end-to-end")) == [names_of("vit")]


def test_cuts_by_units_and_by_blocks_of_units():
    names = names_of("vit")

    def cut(*cuts, modules=None):
        with traced_once("vit"):
            return units(localize(build("vit"), modules, cuts=cuts))

    assert cut("blocks.0", "blocks.2") == [names[:2], names[2:4], names[4:]]
    assert cut("blocks") == [names[:-1], names[-1:]]
    assert cut("blocks.2", modules=2) == [names[:4], names[4:]]
    assert cut() == [names]


def test_stages():
    model, names = build("resnet"), names_of("resnet")
    assert [name.partition(".")[0] for name in names] == ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"]
    with traced_once("resnet"):
        four = localize(model, 4, partition="stage", input_size=SIZE)
        two = localize(model, 2, partition="stage", input_size=SIZE)
    assert units(four) == [names[:2], names[2:3], names[3:4], names[4:]]
    assert sum(map(len, units(two))) == len(names)
    assert units(two)[0][-1] in names[1:4]
    swin = localize(build("swin"), 2, partition="stage")
    assert {unit.split(".")[1] for unit in units(swin)[0] if "." in unit} == {"0"}
    assert units(swin)[1][-1] == "head"
    assert {unit.split(".")[1] for unit in units(swin)[1][:-1]} == {"1"}


# With the first decoder the auxiliary net outweighs a block, so that the best cut is another than without it.
BALANCED = [
    ("vit", "infopro", "infopro"),
    ("cnn", "greedy", "conv"),
]


@pytest.mark.parametrize(("name", "method", "decoder"), BALANCED)
def test_the_balanced_cut_makes_the_largest_module_smallest(name, method, decoder):
    model, (images, labels) = build(name).train(), batch(16)

    def cut(*places, **options):
        return localize(model, None if places else 2, method, decoder, cuts=places or None, input_size=SIZE, **options)

    with traced_once(name):
        sizes = {place: max(module_peaks(cut(place), images, labels)) for place in names_of(name)[:-1]}
        net = cut(batch_size=16, min_depth=0)
    assert sizes[net.local_modules[0].units[-1]] == pytest.approx(min(sizes.values()), rel=0.02)
    assert max(sizes.values()) > 1.1 * min(sizes.values())


@pytest.mark.parametrize(
    ("name", "method", "reach"), [("vit", "greedy", 1), ("cnn", "feature-reconstruction", 1), ("swin", "greedy", 2)]
)
def test_the_balanced_cut_makes_the_largest_module_smallest_with_heads_that_read_ahead(name, method, reach):
    def cut(*places, **options):
        return localize(
            build(name), None if places else 2, method, cuts=places or None, input_size=SIZE, reach=reach, **options
        ).train()

    def largest(net):
        step = simulate_step(net, OptimConfig(), 16, SIZE)  # whose peak is that of a real step
        return step.peak - step.parts["parameters"] - step.parts["optimizer"]

    with traced_once(name):
        sizes = {place: largest(cut(place)) for place in names_of(name)[:-1]}
        net = cut(batch_size=16, min_depth=0)
    assert sizes[net.local_modules[0].units[-1]] == pytest.approx(min(sizes.values()), rel=0.02)
    assert max(sizes.values()) > 1.1 * min(sizes.values())


def test_the_batch_size_weighs_activations_against_gradients():
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
        *(nn.AvgPool2d(8), nn.Flatten()),
        *(nn.Linear(128, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 5)),
    )
    first = [units(localize(model, 2, "greedy", input_size=SIZE, batch_size=size))[0] for size in (1, 1024)]
    assert len(first[0]) > len(first[1]) == 1


def test_in_micro_batches_the_balanced_cut_takes_least():
    """All gradients wait there, wherever the cut is; what a single image takes would weigh them against each other."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(8), nn.Flatten()),
        *(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 5)),
    )
    config = OptimConfig(micro_batches=8)
    names = [unit.name for unit in chain(model, SIZE)][:-1]
    peaks = {
        name: simulate_step(localize(model, 2, "greedy", cuts=[name], input_size=SIZE), config, 8, SIZE).peak
        for name in names
    }
    best, other = (
        units(localize(model, 2, "greedy", input_size=SIZE, min_depth=0, **sizes))[0][-1]
        for sizes in ({"batch_size": 8, "micro_batches": 8}, {"batch_size": 1})
    )
    assert peaks[best] == min(peaks.values())
    assert peaks[other] > 1.02 * peaks[best]


def test_balancing_leaves_the_model_and_the_random_state_alone():
    model = build("swin").eval()
    weights = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    net = localize(model, 2)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    with traced_once("swin"):
        same = localize(model, cuts=net.local_modules[0].units[-1:])
    assert torch.equal(after, torch.get_rng_state())
    for a, b in zip(net.local_modules, same.local_modules, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.local_loss.parameters(), b.local_loss.parameters(), strict=True))
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


def test_auxiliary_nets_take_the_models_dtype():
    net = split("mlp", model=build("mlp").double())
    assert {p.dtype for p in net.parameters()} == {torch.float64}


def test_a_criterion_of_ones_own_is_every_modules():
    # This one takes probabilities only.
    net = localize(build("mlp"), 3, "greedy", input_size=SIZE, criterion=SoftTargetCrossEntropy())
    images, labels = batch()
    output = net.eval().backward(images, F.one_hot(labels, 5).float())
    for loss, logits in zip(output.losses, output.predictions, strict=True):
        torch.testing.assert_close(loss, F.cross_entropy(logits, labels))


def test_batch_size_and_partition_do_not_change_what_is_computed():
    model, images = build("cnn").eval(), batch()[0]
    expected = model(images)
    for options in ({"modules": 2}, {"modules": 2, "batch_size": 1000}, {"modules": 2, "partition": "stage"}):
        assert torch.equal(localize(model, input_size=SIZE, **options)(images), expected)


INFOPRO = {"method": "infopro", "modules": 2}
MISTAKES = [
    ({"modules": 99}, ChainError, ["99", "at most 4: 1, 4, 7, 9"]),
    ({"modules": 3, "partition": "stage"}, ChainError, ["3 modules", "1 stages", "at most 1"]),
    ({"modules": 0}, ConfigError, ["modules is 0", "at least 1"]),
    ({"modules": -1}, ConfigError, ["modules is -1", "at least 1"]),
    ({"modules": 4, "cuts": ["1"]}, ConfigError, ["1 cuts make 2 modules, not 4"]),
    ({"cuts": ["44"]}, ChainError, ["'44'", "did you mean '4'?"]),
    ({"cuts": ["4", "1"]}, ChainError, ["4, 1", "order", "1, 4, 7, 9"]),
    ({"cuts": ["4", "4"]}, ChainError, ["4, 4", "order", "1, 4, 7, 9"]),
    ({"cuts": ["9"]}, ChainError, ["before the last unit", "1, 4, 7, 9"]),
    ({"method": "greddy"}, ConfigError, ["'greddy'", "did you mean 'greedy'?"]),
    ({"decoder": "conf", "modules": 2}, ConfigError, ["'conf'", "did you mean 'conv'?"]),
    ({"head": "mpl", "modules": 2}, ConfigError, ["'mpl'", "did you mean 'mlp'?"]),
    ({"partition": "balancd", "modules": 2}, ConfigError, ["'balancd'", "did you mean 'balanced'?"]),
    ({"method": "end-to-end", "modules": 5}, ChainError, ["5 modules asked for", "at most 4: 1, 4, 7, 9"]),
    ({"method": "end-to-end", "modules": 2, "reach": 1}, ConfigError, ["reach is 1", "end-to-end has no heads"]),
    ({"method_kwargs": {"wieght": 2.0}}, ConfigError, ["'wieght'", "did you mean 'weight'?"]),
    ({"method_kwargs": {"weight": "much"}}, ConfigError, ["weight is 'much'", "a number"]),
    ({"method_kwargs": {"normalize": "no"}}, ConfigError, ["normalize is 'no'", "True or False"]),
    ({"method": "greedy", "method_kwargs": {"weight": 1.0}}, ConfigError, ["greedy", "'weight'", "contrast, task"]),
    ({"num_classes": 7}, ChainError, ["(5,)", "(7,)", "num_classes"]),
    ({**INFOPRO, "mean": [0.5], "std": [0.5]}, ConfigError, ["mean has 1 and std 1 values", "3 channels"]),
    ({**INFOPRO, "method_kwargs": {"task": "contrst"}}, ConfigError, ["'contrst'", "contrast"]),
    ({**INFOPRO, "method_kwargs": {"lambda_task": 0}}, ConfigError, ["lambda_task is 0", "two numbers"]),
    ({**INFOPRO, "method_kwargs": {"lambda_reconstruction": (1, 2, 3)}}, ConfigError, ["(1, 2, 3)", "two numbers"]),
    (
        {**INFOPRO, "method_kwargs": {"lambda_task": (0, 0), "lambda_reconstruction": (0, 1)}},
        ConfigError,
        ["are 0 in module 1 of 2"],
    ),
]


@pytest.mark.parametrize(("options", "error", "words"), MISTAKES)
def test_a_mistake_gives_one_line(options, error, words):
    with pytest.raises(error) as caught:
        localize(build("mlp"), input_size=SIZE, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_model_without_a_classifier_is_refused():
    with pytest.raises(ChainError, match=r"expected .*classes") as caught:
        localize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), 2, input_size=SIZE)
    assert "\n" not in str(caught.value)
