"""A captured backward pass, for a training loop of one's own, gives the bits of `backward`."""

import pytest
import torch
from torch import nn

from localprop.errors import ConfigError
from localprop.network.capture import CapturedBackward
from tape import TapePool
from tiny import batch, split


def loop(net, optimizers, clip):
    """What is done after each module: everything stays on the device."""

    def after(k, loss):
        if clip:
            nn.utils.clip_grad_norm_(net.local_modules[k].parameters(), clip)
        optimizers[k].step()
        optimizers[k].zero_grad(set_to_none=True)

    return after


def optimizers_of(net):
    rate = torch.tensor(1e-3, device=next(net.parameters()).device)
    cuda = rate.is_cuda
    return [
        torch.optim.AdamW(module.parameters(), lr=rate, fused=True, capturable=cuda) for module in net.local_modules
    ]


def outputs(step, device="cpu"):
    found = []
    for seed in range(5):
        images, labels = (tensor.to(device) for tensor in batch(seed=seed))
        output = step(images, labels, seed=seed)
        found.append([output.losses.clone(), *(p.clone() for p in output.predictions if p is not None)])
    return found


def assert_equal(a, b):
    for own, other in zip(a, b, strict=True):
        for x, y in zip(own, other, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize(("name", "method"), [("swin", "greedy"), ("vit", "feature-reconstruction")])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_captured_pass_is_backward(name, method, clip):
    nets = [split(name, method=method).train() for _ in range(2)]
    after = [loop(net, optimizers_of(net), clip) for net in nets]
    eager = outputs(lambda images, labels, seed: nets[0].backward(images, labels, seed=seed, after_module=after[0]))
    pool = TapePool()
    assert_equal(eager, outputs(CapturedBackward(nets[1], pool, after[1])))
    assert pool.captures == 3
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_cannot_be_captured_is_one_line():
    net = split("mlp", method="greedy").train()
    step = CapturedBackward(net, TapePool(), lambda k, loss: loss.item())
    images, labels = batch()
    step(images, labels)
    with pytest.raises(ConfigError, match=r"cannot be captured as CUDA graphs .*capturing.*call backward") as caught:
        step(images, labels)
    assert "\n" not in str(caught.value)


def test_a_batch_unlike_the_captured_one_is_refused():
    net = split("mlp", method="greedy").train()
    step = CapturedBackward(net, TapePool(), lambda k, loss: net.local_modules[k].zero_grad())
    images, labels = batch()
    for _ in range(3):
        step(images, labels)
    with pytest.raises(ConfigError, match="other shapes or types than the captured one"):
        step(images[:2], labels[:2])


def test_gradients_that_a_step_leaves_are_refused_unless_the_caller_keeps_them():
    net = split("mlp", method="greedy").train()
    step = CapturedBackward(net, TapePool())
    images, labels = batch()
    step(images, labels)
    net.zero_grad()
    with pytest.raises(ConfigError, match=r"leaves gradients; .* sets its gradients to None, or call backward"):
        step(images, labels)
    assert all(parameter.grad is None for parameter in net.parameters())
    step = CapturedBackward(net, TapePool())
    found = []
    for _ in range(4):
        step(images, labels, seed=0)
        found.append([parameter.grad.clone() for parameter in net.parameters()])
        net.zero_grad(set_to_none=False)
    for own in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], own, strict=True))


def test_without_cuda_it_is_one_line():
    with pytest.raises(ConfigError, match="CUDA graphs need CUDA, and the network is on cpu"):
        split("mlp", method="greedy").capture()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    ("name", "method", "reach"),
    [("swin", "greedy", 0), ("vit", "feature-reconstruction", 0), ("swin", "feature-reconstruction", 1)],
)
def test_a_captured_pass_is_backward_on_cuda(name, method, reach, half, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # as in a run, or no two passes are equal
    results = []
    for captured in (False, True):
        net = split(name, method=method, decoder="pixel-shuffle", reach=reach).to("cuda").train()
        after = loop(net, optimizers_of(net), 0.1)
        step = net.capture(after_module=after) if captured else None

        def train(images, labels, seed, net=net, after=after, step=step):
            with torch.autocast("cuda", torch.bfloat16, enabled=half):
                if step:
                    return step(images, labels, seed=seed)
                return net.backward(images, labels, seed=seed, after_module=after)

        results.append([*outputs(train, "cuda"), [p.detach().clone() for p in net.parameters()]])
    assert_equal(*results)
