"""Compiled local modules compute what they compute otherwise."""

import shutil

import pytest
import timm
import torch
from torch import nn

from checkpoint_states import bits
from localprop import localize
from localprop.errors import ConfigError
from localprop.planning.simulation import simulate_step
from localprop.settings.config import OptimConfig
from localprop.training.checkpoints.loading import load_checkpoint
from localprop.training.checkpoints.saving import save_checkpoint
from localprop.training.compiling import compile_network, require_compiler
from localprop.training.state import TrainingState
from one_graph import one_graph
from tiny import CLASSES, SIZE, assert_same, batch, gradients, split

CPU = torch.device("cpu")


def training(compiled, device=CPU):
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        patch_size=4,
        window_size=4,
        embed_dim=12,
        depths=(1,),
        num_heads=(1,),
        num_classes=CLASSES,
        drop_path_rate=0.3,
        proj_drop_rate=0.1,
    )
    net = localize(model, method="greedy", head="linear", cuts=["layers.0"], input_size=SIZE).to(device)
    keys = list(net.state_dict())
    if compiled:
        compile_network(net)
    assert list(net.state_dict()) == keys
    return TrainingState(net.train(), OptimConfig(epochs=1, lr=1e-3), 10, device)


def steps(state, count, device=CPU):
    return [state.train_step([t.to(device) for t in batch()], seed=state.step).cpu() for _ in range(count)]


@pytest.mark.processes  # compilers, for up to a minute where the cache of torch.compile is empty
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_compiled_training_is_eager_training(tmp_path):
    torch._dynamo.utils.counters.clear()
    plain, compiled = training(False), training(True)
    losses = steps(compiled, 3)
    torch.testing.assert_close(losses, steps(plain, 3), rtol=1e-4, atol=1e-5)  # the same paths and values dropped
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 4  # two modules and two losses

    compiled.net.eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        logits = compiled.net.module_predictions(batch()[0])
        assert torch.equal(logits[-1], compiled.net.backbone(batch()[0]))
    compiled.net.train()
    assert counters["stats"]["unique_graphs"] == 4

    path = save_checkpoint(tmp_path, 3, compiled.parts(), {}, 1)
    resumed = training(True)
    resumed.load(load_checkpoint(path).parts, 3)
    assert bits(steps(resumed, 2)) == bits(steps(compiled, 2))
    assert bits(resumed.net.state_dict()) == bits(compiled.net.state_dict())


@pytest.mark.processes  # compilers, as above
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("kinetic", [0.0, 0.1])
def test_compiled_exact_training_has_the_bits_of_one_graph_of_compiled_modules(kinetic):
    torch._dynamo.reset()
    own, other = (split("vit", 3, "end-to-end", kinetic=kinetic, recompute=False).train() for _ in range(2))
    plain = split("vit", 3, "end-to-end", kinetic=kinetic).train()
    for net in (own, other):
        compile_network(net)
    images, labels = batch()
    own.backward(images, labels, seed=1)
    one_graph(other, images, labels, 1)
    one_graph(plain, images, labels, 1)
    assert_same(gradients(own), gradients(other))
    torch.testing.assert_close(gradients(own), gradients(plain), rtol=1e-3, atol=1e-5)


@pytest.mark.processes  # compilers, as above
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_two_backward_passes_through_compiled_units():
    """Of which the compiler's cache has code that lets one pass alone, from a run in which they are a module."""
    donated = torch._functorch.config.donated_buffer
    try:
        for reach in (0, 1):
            torch._dynamo.reset()
            layers = [nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Tanh()) for _ in range(3)]
            model = nn.Sequential(nn.Flatten(), *layers, nn.Linear(8, CLASSES))
            net = localize(model, method="greedy", cuts=["1", "2"], reach=reach, input_size=(2, 2, 2)).train()
            compile_network(net)
            net.backward(torch.randn(4, 2, 2, 2), torch.arange(4))
            assert all(parameter.grad is not None for parameter in net.parameters())
    finally:
        torch._functorch.config.donated_buffer = donated


def test_the_plan_of_a_compiled_network_leaves_it_alone():
    """What is compiled of a loss's two parts is bound to that loss, and a copy of it would be too."""
    plain, compiled = (split("mlp", 2, reach=1, recompute=False) for _ in range(2))
    compile_network(compiled)
    steps = [simulate_step(net, OptimConfig(), 16, SIZE) for net in (plain, compiled)]
    assert steps[0] == steps[1]
    assert all(parameter.grad is None for parameter in compiled.parameters())


def test_without_a_compiler_the_error_is_one_line(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(ConfigError, match=r"No working C\+\+ compiler.*install a C\+\+ compiler") as caught:
        require_compiler(CPU, "--compile")
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_training_is_eager_training_on_cuda():
    device = torch.device("cuda")
    require_compiler(device, "--compile")
    plain, compiled = (steps(training(flag, device), 3, device) for flag in (False, True))
    torch.testing.assert_close(plain, compiled, rtol=1e-3, atol=1e-4)
