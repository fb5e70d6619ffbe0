"""Why the peak is where it is: what is explained adds up to the prediction, and names the layers that made it."""

import pytest
import torch
from torch import nn

from localprop import localize
from localprop.planning.peaks import explain_peak
from localprop.planning.simulation import simulate_step
from localprop.planning.tables import percentages
from localprop.settings.config import OptimConfig
from tiny import MODELS, SIZE, build, split, traced_once

BATCH = 16
CASES = [(name, {}, {}) for name in MODELS]
CASES += [
    ("vit", {"grad_checkpointing": True}, {"amp": True, "model_ema": True, "clip_grad": 1.0}),
    ("swin", {}, {"micro_batches": 4}),
    ("cnn", {"method": "infopro"}, {"micro_batches": 2}),
    ("vit", {}, {"micro_batches": 4, "offload_optimizer": True}),
    ("mlp", {}, {"offload_optimizer": True}),
]


def explained(net, config, name="K=3"):
    peak = explain_peak(name, net, config, BATCH, SIZE, "cpu")
    step = simulate_step(net, config, BATCH, SIZE)
    assert sum(part.size for part in [*peak.tensors, *peak.rest]) == peak.size == step.peak
    uses = {use: sum(part.size for part in [*peak.tensors, *peak.rest] if part.use == use) for use in step.parts}
    assert uses == step.parts
    assert peak.module == step.module
    assert [t.size for t in peak.tensors] == sorted((t.size for t in peak.tensors), reverse=True)
    return peak


@pytest.mark.parametrize(("name", "options", "settings"), CASES)
def test_its_sums_are_the_predicted_peak_to_the_byte(name, options, settings):
    peak = explained(split(name, **options), OptimConfig(**settings))
    parts = settings.get("micro_batches", 1)
    assert peak.micro_batches == parts
    assert (peak.micro_batch is None) == (parts == 1)
    if peak.phase in ("forward", "backward"):
        assert peak.layer


@pytest.mark.parametrize("name", MODELS)
def test_its_sums_are_the_predicted_peak_of_end_to_end_training(name):
    with traced_once(name):
        net = localize(build(name), method="end-to-end", input_size=SIZE)
    explained(net, OptimConfig(), "end-to-end")


class Wide(nn.Sequential):
    """Its widest layer gives 4096 numbers for each of 32 positions."""

    def __init__(self):
        super().__init__(
            nn.Flatten(2),
            nn.Linear(1024, 8),
            nn.ReLU(),
            nn.Linear(8, 4096),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(12288, 5),
        )


def test_layers_of_the_forward_and_of_the_backward_are_named():
    net = localize(Wide(), method="end-to-end", input_size=SIZE)
    peak = explained(net, OptimConfig(opt="sgd"))
    wide = BATCH * 3 * 4096 * 4
    assert (peak.phase, peak.micro_batch, peak.modules, peak.module) == ("backward", None, 1, 0)
    kept, gradient = (
        [t for t in peak.tensors if t.use == use and t.size == wide] for use in ("activations", "temporaries")
    )
    assert [t.layer for t in kept] == ["4"]  # what tanh gave, which its backward needs
    assert {t.layer for t in gradient} <= {"4", "6"}
    assert ("the batch", (BATCH, *SIZE)) in [(t.layer, t.shape) for t in peak.tensors]
    numbered = [t.size for t in peak.tensors if t.layer and t.layer.isdecimal()]
    assert peak.kinds[0].layers == "*"
    assert peak.kinds[0].count >= len(numbered)
    assert peak.kinds[0].size >= sum(numbered)
    assert all(t.dtype == "float32" and len(t.shape) in (2, 3) for t in peak.tensors if t.size == wide)


def test_the_step_of_an_optimizer_is_named():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 512), nn.ReLU(), nn.Linear(512, 5))
    net = localize(model, method="end-to-end", input_size=SIZE)
    peak = explain_peak("end-to-end", net, OptimConfig(opt="lamb"), 1, SIZE, "cpu")
    assert (peak.phase, peak.layer) == ("optimizer step", None)
    assert [t.shape for t in peak.tensors[:3]] == [(512, 3072)] * 3
    groups = {rest.use: rest for rest in peak.rest}
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert (groups["parameters"].count, groups["parameters"].size) == (4, weights)
    assert (groups["gradients"].count, groups["gradients"].size) == (4, weights)
    assert groups["optimizer"].count == 8  # two moments of each


def test_what_a_unit_computes_outside_its_modules_is_the_units():
    class Glue(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3072, 8), nn.Linear(8, 5)

        def forward(self, x):
            return self.b(torch.cat([self.a(x.flatten(1)).unsqueeze(1)] * 900, 1).exp().mean(1))

    peak = explained(localize(Glue(), method="end-to-end", input_size=SIZE), OptimConfig(opt="sgd"))
    wide = [t for t in peak.tensors if t.shape == (BATCH, 900, 8)]
    assert {t.layer for t in wide if t.use == "activations"} == {"a"}


@pytest.mark.parametrize(
    ("sizes", "rest"),
    [([1] * 7, [1, 2]), ([333, 333], [334]), ([10**9] * 10, [10**10, 3, 5 * 10**8]), ([], [5]), ([1] * 3, [2000, 1])],
)
def test_shares_sum_to_a_hundred_and_are_equal_for_equal_sizes(sizes, rest):
    shares, others = percentages(sizes, rest)
    assert sum(round(10 * float(share)) for share in [*shares, *others]) == 1000
    assert all(shares[i] == shares[j] for i, a in enumerate(sizes) for j, b in enumerate(sizes) if a == b)
    whole = sum(sizes) + sum(rest)
    for share, size in zip([*shares, *others], [*sizes, *rest], strict=True):
        assert float(share) == pytest.approx(100 * size / whole, abs=0.5)
        assert float(share) >= 0
