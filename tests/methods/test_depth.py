"""Weights by depth and supervised contrast, in every method with a head."""

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

from local_losses import LABELS, features, make_loss
from localprop import LocalLoss, localize
from localprop.errors import ConfigError
from localprop.methods import METHODS, varying
from localprop.methods.common import supervised_contrast
from localprop.settings.config import DataConfig
from localprop.tasks.classification import Classification
from tiny import SIZE, batch, split

HEADS_ALONE = ["greedy", "trgl"]
OUTPUT, INPUT = features((4, 4, 24)), features((8, 8, 12), seed=1)


def value_of(loss):
    return loss(OUTPUT, INPUT, None, LABELS)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_weights_lie_on_the_line_between_the_first_and_the_last_but_one(count):
    options = {"reconstruction": (1, 0.2), "task": (0.3, 1), "weight": 2.0}
    losses = [make_loss("feature-reconstruction", i, count, **options) for i in range(count - 1)]
    steps = np.linspace(0, 1, count - 1) if count > 2 else [0]
    assert [loss.task_weight for loss in losses] == pytest.approx([0.3 + 0.7 * step for step in steps])
    assert [loss.weight for loss in losses] == pytest.approx([2 * (1 - 0.8 * step) for step in steps])
    greedy = [make_loss("greedy", i, count, task=(0.3, 1)) for i in range(count - 1)]
    assert [loss.task_weight for loss in greedy] == [loss.task_weight for loss in losses]


def test_the_loss_is_the_weighted_sum_of_both_terms():
    parts = [make_loss("feature-reconstruction"), make_loss("feature-reconstruction", task=(0, 0))]
    both, error = (value_of(loss)[0] for loss in parts)
    own = make_loss("feature-reconstruction", count=3, reconstruction=(1, 0.25), task=(1, 3))
    own.load_state_dict(parts[0].state_dict())
    # The same decoder in all: its error is what is left without the head.
    parts[1].load_state_dict({k: v for k, v in parts[0].state_dict().items() if not k.startswith("head")})
    error = value_of(parts[1])[0]
    value, logits = value_of(own)
    torch.testing.assert_close(value, 3 * (both - error) + 0.25 * error)
    assert torch.equal(logits, own.predict(OUTPUT))


def test_a_term_of_weight_0_is_left_out_with_its_net():
    losses = [make_loss("feature-reconstruction", i, reconstruction=(1, 0), task=(0, 1)) for i in range(3)]
    assert [loss.head is None for loss in losses] == [True, False, False]
    assert [loss.decoder is None for loss in losses] == [False, False, True]
    value, logits = value_of(losses[2])
    assert torch.equal(value, F.cross_entropy(losses[2].head(OUTPUT), LABELS))
    assert torch.equal(logits, losses[2].predict(OUTPUT))
    assert value_of(make_loss("feature-reconstruction", task=(0, 0)))[1] is None
    assert losses[0].predict(OUTPUT) is None


def test_a_network_without_a_head_in_front_trains():
    net = split("vit", method="feature-reconstruction", method_kwargs={"reconstruction": (1, 0), "task": (0, 1)})
    found = net.backward(*batch())
    assert [prediction is None for prediction in found.predictions] == [True, False, False]
    assert all(p.grad is not None for module in net.local_modules for p in module.parameters())


@pytest.mark.parametrize("method", HEADS_ALONE)
@pytest.mark.parametrize("task", [(1, 0), (0, 0)])
def test_a_module_without_any_loss_is_one_line(method, task):
    with pytest.raises(ConfigError, match="task is 0 in module 3 of 4, which would learn nothing; raise it"):
        make_loss(method, 2, task=task)


def test_a_module_without_both_terms_is_one_line():
    with pytest.raises(ConfigError, match=r"reconstruction and task are 0 in module 3 of 4.*; raise one of them"):
        make_loss("feature-reconstruction", 2, reconstruction=(1, 0), task=(1, 0))
    with pytest.raises(ConfigError, match="reconstruction and task are 0 in module 2 of 4"):
        make_loss("feature-reconstruction", weight=0.0, task=(0, 0))


@pytest.mark.parametrize("value", [1.0, (1,), (1, 2, 3), ("a", 1), None, (1, -1), (float("nan"), 1)])
@pytest.mark.parametrize(
    ("method", "name"),
    [("greedy", "task"), ("feature-reconstruction", "reconstruction"), ("infopro", "lambda_task"), ("trgl", "task")],
)
def test_impossible_weights_are_one_line(method, name, value):
    with pytest.raises(ConfigError, match=f"^{name} is .*; it") as error:
        make_loss(method, **{name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["feature-reconstruction", "greedy", "trgl"])
def test_the_first_modules_learn_by_contrast(method):
    losses = [make_loss(method, i, contrast=2, temperature=0.5) for i in range(3)]
    for i, loss in enumerate(losses):
        judged, logits = loss.judge(OUTPUT, LABELS)
        if i == 2:
            assert torch.equal(judged, F.cross_entropy(logits, LABELS))
            continue
        vectors = loss.head(OUTPUT)
        assert vectors.shape == (6, 128)
        assert torch.equal(judged, supervised_contrast(vectors, LABELS, 0.5))
        assert logits is None
        assert loss.predict(OUTPUT) is None


def test_contrast_has_the_tasks_weight():
    plain, half = (make_loss("greedy", contrast=3, task=(weight, weight)) for weight in (1, 0.5))
    torch.testing.assert_close(value_of(half)[0], 0.5 * value_of(plain)[0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"contrast": -1}, "contrast is -1; it is a number of modules, at least 0"),
        ({"temperature": 0.0}, "temperature is 0; it must be above 0"),
        ({"temperature": -1.0}, "temperature is -1; it must be above 0"),
        ({"temperature": float("nan")}, "temperature is nan; it must be above 0"),
    ],
)
@pytest.mark.parametrize("method", ["greedy", "feature-reconstruction"])
def test_impossible_contrast_is_one_line(method, options, said):
    with pytest.raises(ConfigError, match=said):
        make_loss(method, **options)


@pytest.mark.parametrize("options", [{"contrast": 1.5}, {"contrast": True}, {"contrast": "two"}])
def test_contrast_counts_modules(options):
    with pytest.raises(ConfigError, match=r"contrast is .*; it is a whole number"):
        split("vit", method="greedy", method_kwargs=options)


@pytest.mark.parametrize("mixing", [{"mixup": 0.2}, {"cutmix": 0.3}])
@pytest.mark.parametrize(
    ("method", "options"), [("greedy", {"contrast": 1}), ("infopro", {"task": "contrast"}), ("trgl", {"contrast": 1})]
)
def test_contrast_is_refused_with_mixed_labels_before_training(mixing, method, options):
    task = Classification.of(DataConfig(**mixing), ["a"] * 5)
    with pytest.raises(
        ConfigError, match="one integer label for each image; leave out the contrast, or mixup"
    ) as error:
        split("vit", method=method, task=task, method_kwargs=options)
    assert "\n" not in str(error.value)
    split("vit", method=method, task=task)
    split("vit", method=method, task=Classification.of(DataConfig(), ["a"] * 5), method_kwargs=options)


def test_what_a_loss_costs_can_be_told_from_its_name():
    """Costs are looked up by it: of a contrast that has as many outputs as the criterion, too."""
    losses = [make_loss("greedy", contrast=contrast) for contrast in (0, 2)]
    losses[0].head.mlp[-1] = torch.nn.Linear(24, 128)
    assert repr(losses[0]) != repr(losses[1])


def test_which_modules_have_other_losses_is_known():
    assert not varying({"task": (1.0, 1.0), "reconstruction": [1, 1], "contrast": 0, "weight": 0.5})
    assert not varying({"lambda_task": (), "published": False})
    for option in ({"task": (1, 0)}, {"reconstruction": [0, 1]}, {"contrast": 2}, {"published": True}):
        assert varying({"weight": 0.5, **option})


class Uneven(LocalLoss):
    """A local loss whose net is very wide in the second module."""

    uses_inputs = False

    def __init__(self, spec, task=(1.0, 0.5)):
        super().__init__()
        width = 2048 if spec.index == 1 else 1
        self.net = torch.nn.Sequential(torch.nn.Linear(spec.output.channels, width), torch.nn.Tanh())

    def forward(self, output, features, inputs, targets):
        return self.net(output).mean(), None

    def predict(self, output):
        return None


def test_balance_knows_which_module_it_is():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=6, embed_dim=48, num_heads=3)
    METHODS.register("uneven", Uneven)
    try:
        net = localize(model, 4, "uneven", input_size=SIZE)
        alike = localize(model, 4, "uneven", input_size=SIZE, method_kwargs={"task": (1, 1)})
    finally:
        del METHODS["uneven"]
    # The second module is as small as can be, and the third is not, though it lies between the first and the last, too.
    assert [len(module.units) for module in net.local_modules] == [2, 1, 2, 3]
    # Where no option says that modules differ, the second stands for all between.
    assert [len(module.units) for module in alike.local_modules][1:3] == [1, 1]
