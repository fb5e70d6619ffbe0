"""Recomputing what is cheap: the same bits, fewer bytes kept, and nothing remembered."""

import weakref
from contextlib import nullcontext
from itertools import accumulate, chain

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import gelu, layer_norm, silu
from torch.utils.checkpoint import checkpoint

import localprop
from localprop import localize
from localprop.memory.measure import allocated_changes, measured
from localprop.memory.recompute import recomputing
from localprop.planning.simulation import simulate_step
from localprop.settings.config import OptimConfig
from localprop.training.state import TrainingState
from tiny import SIZE, batch, build, split, traced_once


def gradients(model, images, labels, *, recompute, amp):
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp), recomputing(recompute):
        loss = F.cross_entropy(model(images), labels)
    loss.backward()
    result = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return result


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("name", ["swin", "vit", "cnn"])
def test_gradients_are_the_same_bit_for_bit(name, amp):
    model, (images, labels) = build(name).train(), batch()
    plain = gradients(model, images, labels, recompute=False, amp=amp)
    again = gradients(model, images, labels, recompute=True, amp=amp)
    assert all(gradient is not None for gradient in plain.values())
    assert [key for key in plain if not torch.equal(plain[key], again[key])] == []


FUNCTIONS = {
    **{name: getattr(F, name) for name in ("gelu", "silu", "mish", "hardswish", "elu", "softplus", "leaky_relu")},
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "layer_norm": lambda x: F.layer_norm(x, (64,), torch.linspace(0, 2, 64), torch.linspace(-1, 1, 64)),
    "layer_norm, eps": lambda x: F.layer_norm(x, (64,), eps=0.3),
    "layer_norm, two axes": lambda x: F.layer_norm(x, (32, 64), eps=0.3),
    "layer_norm, as torch has it": lambda x: torch.layer_norm(x, (64,), eps=0.3),
    "layer_norm, imported by name": lambda x: layer_norm(x, (64,), eps=0.3),
    "gelu, imported by name": lambda x: gelu(x, approximate="tanh"),
    "silu, imported by name": lambda x: silu(x),
    "gelu, as torch has it": lambda x: torch.ops.aten.gelu(x),
    "elu, alpha": lambda x: F.elu(x, 0.3),
    "selu": lambda x: F.selu(x),
    "softplus, beta": lambda x: F.softplus(x, 2.0, 5.0),
    "leaky_relu, slope": lambda x: F.leaky_relu(x, 0.3),
    "a module": lambda x: nn.LayerNorm(64, eps=0.3)(x),
    "timm's module": lambda x: timm.layers.LayerNorm(64, eps=0.3)(x),
    "a view": lambda x: F.gelu(x).view(64, 32).t()[3:],
}
WIDTH = 32 * 64 * 4  # bytes of a result


def product(function, recompute):
    """The graph of function(x) @ w; x, w."""
    x, w = (torch.randn(*size, generator=torch.Generator().manual_seed(0)) for size in ((32, 64), (64, 64)))
    x.requires_grad_()
    w.requires_grad_()
    with recomputing(recompute):
        return (function(x.clone()) @ w).square().sum(), x, w


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_cheap_result_is_computed_again(name):
    results, kept = [], []
    for recompute in (False, True):
        changes, (loss, x, w) = allocated_changes(lambda r=recompute: product(FUNCTIONS[name], r))
        loss.backward()
        results.append([x.grad, w.grad])
        kept.append(sum(changes))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kept[0] - kept[1] == WIDTH


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("amp", [False, True])
def test_on_cuda_gradients_are_the_same_and_fewer_bytes_are_kept(amp, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # as in a run, or no two steps are equal
    model = build("vit").train().cuda()
    images, labels = (tensor.cuda() for tensor in batch(64))
    found, kept = [], []
    for recompute in (False, False, True):  # the first allocates workspaces that stay
        torch.manual_seed(0)
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16, enabled=amp, cache_enabled=False), recomputing(recompute):
            loss = F.cross_entropy(model(images), labels)
        kept.append(torch.cuda.memory_allocated() - before)
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
        del loss
        model.zero_grad()
    assert [name for name in found[1] if not torch.equal(found[1][name], found[2][name])] == []
    assert kept[2] < kept[1]


@pytest.mark.parametrize(("name", "most"), [("swin", 0.85), ("vit", 0.8)])
def test_fewer_bytes_are_kept_for_backward(name, most):
    model, images = build(name).eval(), batch(16)[0]  # without dropout, which has results of its own

    def kept(recompute):
        def run():
            with recomputing(recompute):
                return model(images)

        changes, _ = allocated_changes(run)
        return sum(changes)

    assert kept(True) < most * kept(False)


def block():
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))


def watch(module, name):
    """Gives a function that tells whether the input ("input") or output of `module` lives."""
    found = []
    module.register_forward_hook(
        lambda _, inputs, output: found.append(
            weakref.ref((inputs[0] if name == "input" else output).untyped_storage())
        )
    )
    return lambda: found[0]() is not None


def test_the_result_is_gone_after_forward_and_what_it_comes_from_after_backward():
    for recompute in (False, True):
        model = block()
        before, after = watch(model[1], "input"), watch(model[1], "output")
        with recomputing(recompute):
            loss = model(torch.randn(8, 64)).sum()
        assert after() != recompute
        assert before()
        loss.backward()
        assert not before()
        assert not after()


def test_of_a_checkpointed_block_nothing_is_remembered():
    model = block()
    lives = watch(model[1], "input")
    with recomputing():
        loss = checkpoint(model, torch.randn(8, 64), use_reentrant=False).sum()
        assert not lives()
    loss.backward()


@pytest.mark.parametrize("function", [gelu, lambda x: layer_norm(x, (64,))])
def test_the_result_of_a_checkpointed_block_is_kept(function):
    results = []
    for recompute in (False, True):
        weight = torch.ones(64, 64, requires_grad=True)
        with recomputing(recompute):
            hidden = checkpoint(lambda x: function(x * 2), weight * 0.1, use_reentrant=False)
            loss = (hidden @ weight).square().sum()
        loss.backward()
        results.append(weight.grad)
    assert torch.equal(*results)


def test_a_unit_that_runs_again_may_follow_one_that_ends_in_a_layer_norm():
    """Activation checkpointing keeps its input without a node of the graph, so it seems kept by the layer norm."""
    nets = [split("swin", 2, grad_checkpointing=again, recompute=True).train() for again in (False, True)]
    assert nets[1].local_modules[0].recomputation[:2] == ("whole", "whole")
    for net in nets:
        net.backward(*batch(), seed=0)
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("amp", [False, True])
def test_a_product_computes_its_input_again_only_for_the_gradient_of_its_weight(monkeypatch, amp):
    called, cheap = [], localprop.memory.recompute._CHEAP
    again = cheap["GeluBackward0"]
    monkeypatch.setitem(cheap, "GeluBackward0", lambda node: called.append(1) or again(node))
    layers = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    x = torch.randn(4, 3, 8, requires_grad=True)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp), recomputing(enabled):
            loss = layers(x).float().square().sum()
        torch.autograd.backward(loss, inputs=[x], retain_graph=True)
        assert not called
        torch.autograd.backward(loss, inputs=list(layers.parameters()))
        found.append([tensor.grad for tensor in (x, *layers.parameters())])
        x.grad = None
        layers.zero_grad()
    assert called == [1]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_the_result_of_a_layer_norm_without_notes_is_kept():
    loss, x, _ = product(lambda x: torch.native_layer_norm(x, (64,), None, None, 0.3)[0], True)
    loss.backward()
    again, y, _ = product(lambda x: F.layer_norm(x, (64,), eps=0.3), False)
    again.backward()
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backward_inside_autocast_computes_what_forward_has_computed(dtype):
    def gradient(recompute):
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        with recomputing(recompute):
            loss = layer_norm(gelu(x * 3), (64,)).square().sum()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss.backward()
        return x.grad

    assert torch.equal(gradient(False), gradient(True))


def test_torch_is_as_before_when_the_last_forward_is_over():
    before = torch.layer_norm
    first, second = recomputing(), recomputing()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # forwards of two threads end in any order
    assert torch.layer_norm is not before
    second.__exit__(None, None, None)
    assert torch.layer_norm is before
    with pytest.raises(ZeroDivisionError), recomputing():
        raise ZeroDivisionError
    assert torch.layer_norm is before


@pytest.mark.parametrize(("changed", "word"), [(0, "gelu"), (1, "a tensor")])
def test_an_in_place_change_before_backward_raises(changed, word):
    weight = torch.randn(8, 8, requires_grad=True)
    with recomputing():
        hidden = torch.randn(4, 8) @ weight
        loss = (F.gelu(hidden) @ weight).sum()
    with torch.no_grad():
        (hidden, weight)[changed].add_(1)
    with pytest.raises(RuntimeError, match=f"{word}.* changed in place") as error:
        loss.backward()
    assert "\n" not in str(error.value)


IN_PLACE = [lambda x: F.gelu(x).mul_(2), lambda x: F.silu(x, inplace=True), lambda x: F.hardswish(x, True)]


@pytest.mark.parametrize("function", IN_PLACE)
def test_what_is_changed_in_place_is_kept(function):
    results = []
    for recompute in (False, True):
        loss, x, w = product(function, recompute)
        loss.backward()
        results.append([x.grad, w.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_hooks_of_parameters_are_called():
    """PyTorch 2.8 forgets those of a parameter that the graph is asked for."""
    norm, linear, called = nn.LayerNorm(8), nn.Linear(8, 8), []
    for name, parameter in [*norm.named_parameters("norm"), *linear.named_parameters("linear")]:
        parameter.register_hook(lambda gradient, name=name: called.append(name))
    with recomputing():
        loss = F.gelu(linear(norm(torch.randn(4, 8, requires_grad=True)))).square().sum()
    loss.backward()
    assert sorted(called) == ["linear.bias", "linear.weight", "norm.bias", "norm.weight"]


def test_arguments_may_be_given_by_name():
    for function in (lambda x: F.gelu(input=x), lambda x: F.layer_norm(input=x, normalized_shape=(64,))):
        product(function, True)[0].backward()


def test_local_modules_recompute_and_end_to_end_training_does_not():
    def recompute(**options):
        with traced_once("vit"):
            net = localize(build("vit"), input_size=SIZE, **options)
        return [module.recompute for module in net.local_modules]

    assert recompute(cuts=["blocks.1"]) == [True, True]
    assert recompute(cuts=["blocks.1"], recompute=False) == [False, False]
    assert recompute(method="end-to-end") == [False]
    assert recompute(method="end-to-end", recompute=True) == [True]
    assert recompute(cuts=["blocks.1"], device="cuda") == [False, False]
    assert recompute(cuts=["blocks.1"], device="cuda", recompute=True) == [True, True]


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("options", [{}, {"grad_checkpointing": True}])
def test_a_network_learns_the_same_with_and_without(options, amp):
    results = []
    for recompute in (False, True):
        net, (images, labels) = split("swin", recompute=recompute, **options), batch()
        with torch.autocast("cpu", torch.bfloat16) if amp else nullcontext():
            net.backward(images, labels, seed=0)
        results.append({name: p.grad for name, p in net.named_parameters()})
    assert [name for name in results[0] if not torch.equal(results[0][name], results[1][name])] == []


PER_UNIT = {"blocks.0": "whole", "blocks.1": "none", "blocks.2": "cheap"}


@pytest.mark.parametrize("recompute", [False, True])
def test_each_unit_has_a_recomputation_of_its_own_and_the_same_gradients(recompute):
    images, labels = batch()
    model = build("vit")
    names = [unit.name for unit in localprop.chain(model, SIZE)]
    assert {"blocks.0", "blocks.1"} <= set(names)
    own = {name: value for name, value in PER_UNIT.items() if name in names}
    found = {}
    for key, options in (("plain", {"recompute": False}), ("own", {"recompute": recompute, "recompute_units": own})):
        torch.manual_seed(0)
        net = localize(model, 1, "end-to-end", input_size=SIZE, **options).train()
        kept, _ = allocated_changes(lambda net=net: net.backward(images, labels, seed=1))
        found[key] = {name: p.grad.clone() for name, p in net.named_parameters()}, max(accumulate(kept))
        net.zero_grad()
    assert [name for name, grad in found["plain"][0].items() if not torch.equal(grad, found["own"][0][name])] == []
    assert found["own"][1] < found["plain"][1]
    expected = [own.get(name, "cheap" if recompute else "none") for name in names]
    assert list(net.local_modules[0].recomputation) == expected


@pytest.mark.parametrize("own", [{"blocks": "none"}, {"blocks.0": "whole", "blocks.1": "cheap"}])
def test_the_predicted_peak_follows_the_recomputation_of_each_unit(own):
    net = localize(build("vit"), 2, "greedy", input_size=SIZE, recompute_units=own).train()
    state = TrainingState(net, OptimConfig(opt="sgd", sched="none"), 10, torch.device("cpu"))
    for seed in range(2):
        tensors = [tensor.clone() for tensor in batch(16)]
        with measured(chain(*state.tensors().values()), torch.device("cpu")) as measurement:
            given = [tensor.clone() for tensor in tensors]
            state.train_step(given, seed=seed)
    assert simulate_step(net, state.config, 16, SIZE).peak == pytest.approx(measurement.peak, rel=0.005)


def test_a_recomputation_that_there_is_not_is_told_in_a_line():
    with pytest.raises(localprop.LocalpropError, match=r"has blocks\.0=all; it must be none, cheap, whole, or"):
        localize(build("vit"), 2, input_size=SIZE, recompute_units={"blocks.0": "all"})
    with pytest.raises(localprop.LocalpropError, match="no unit is called 'blocs'; did you mean 'blocks'"):
        localize(build("vit"), 2, input_size=SIZE, recompute_units={"blocs": "whole"})
