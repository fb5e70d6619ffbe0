"""Training with heads that read ahead: loss scales, checkpoints, runs."""

import pytest
import torch
from torch import nn

import localprop
from localprop import localize
from localprop.cli import main
from localprop.settings.config import OptimConfig
from localprop.training.checkpoints.loading import newest_checkpoint
from localprop.training.state import TrainingState
from tiny import SIZE, batch, split

CPU = torch.device("cpu")


def state_of(net=None, **settings):
    net = net or split("swin", method="feature-reconstruction", reach=1)
    return TrainingState(net.train(), OptimConfig(**settings), 10, CPU)


def train(state, steps=2):
    return [state.train_step(list(batch(seed=step)), step) for step in range(steps)]


def test_each_module_has_a_loss_scale_and_gradients_change_theirs_on_the_way():
    plain, scaled = state_of(lr=1e-4), state_of(lr=1e-4, amp=True, amp_dtype="float16")
    for scaler, scale in zip(scaled.scalers, (2.0**4, 2.0**10, 2.0**7), strict=True):
        scaler._lazy_init_scale_growth_tracker(CPU)
        scaler._scale.fill_(scale)
    # Without autocast: powers of two change no bit of float32.
    for a, b in zip(train(plain), train(scaled), strict=True):
        assert torch.equal(a, b)
    for (name, a), b in zip(plain.net.named_parameters(), scaled.net.parameters(), strict=True):
        assert torch.equal(a, b), name


class _Steep(nn.Module):
    """The identity, with a gradient that is 1e36 times as large."""

    def forward(self, features):
        return _Enlarged.apply(features)


class _Enlarged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features):
        return features.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 1e36


def test_an_overflow_on_the_way_back_lowers_both_loss_scales():
    layers = [nn.Linear(3072, 8), nn.Tanh(), nn.Sequential(_Steep(), nn.Linear(8, 6)), nn.Tanh(), nn.Linear(6, 5)]
    model = nn.Sequential(nn.Flatten(), *layers)
    net = localize(model, method="greedy", cuts=["1"], reach=1, input_size=SIZE)
    assert [module.shared for module in net.local_modules] == [0, 1]
    state = state_of(net, amp=True, amp_dtype="float16")
    before = [parameter.clone() for parameter in net.parameters()]
    train(state, 1)
    assert [scaler.get_scale() for scaler in state.scalers] == [2.0**15, 2.0**15]
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


RUN = [
    *("--data", "digits", "--epochs", "1", "--steps", "6", "--batch-size", "64", "--checkpoint-steps", "3"),
    *(
        "--model",
        "swin_tiny_patch4_window7_224",
        "--modules",
        "2",
        "--device",
        "cpu",
        "--experiment",
        "run",
        "--reach",
        "1",
    ),
    *("--model-kwargs", "patch_size=2", "window_size=2", "embed_dim=12", "depths=[1,1]", "num_heads=[1,2]"),
    *("--min-depth", "0", "--model-ema", "--drop-path", "0.2"),
]


def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(tmp_path):
    assert main(["train", *RUN, "--output", str(tmp_path / "whole")]) == 0
    stopped = [*RUN]
    stopped[stopped.index("--steps") + 1] = "4"
    assert main(["train", *stopped, "--output", str(tmp_path / "parts")]) == 0
    assert main(["train", "--resume", str(tmp_path / "parts" / "run"), "--steps", "6", "--device", "cpu"]) == 0
    whole, parts = (newest_checkpoint(tmp_path / kind / "run" / "checkpoints")[0] for kind in ("whole", "parts"))
    for name, own in whole.parts.items():
        for kind in ("backbone", "auxiliary", "ema"):
            for key, tensor in own[kind].items():
                assert torch.equal(tensor, parts.parts[name][kind][key]), key
    heads = [[key for key in part["auxiliary"] if "head." in key] for _, part in sorted(whole.parts.items())]
    assert heads[0] == []
    assert heads[1]
    assert all(key.startswith("before.head.") for key in heads[1])


def test_a_checkpoint_of_another_reach_is_refused():
    own, other = state_of(), state_of(split("swin", method="feature-reconstruction"))
    with pytest.raises(Exception, match=r"does not fit the network .*auxiliary nets hold other weights, such as"):
        own.load(other.parts(), 0)


class _Named(localprop.HeadLoss):
    """A loss with a net that is called as the head of the module before is in a checkpoint."""

    uses_inputs = False

    def __init__(self, spec):
        super().__init__(spec)
        self.head, self.before = spec.build_head(), nn.Linear(1, 1)


@pytest.mark.parametrize("reach", [0, 1])
def test_a_plugins_net_of_the_same_name_is_saved_and_loaded(reach):
    localprop.METHODS["named"] = _Named
    own, other = (state_of(split("swin", method="named", reach=reach)) for _ in range(2))
    for parameter in own.net.parameters():
        nn.init.normal_(parameter)
    other.load(own.parts(), 0)
    for (name, a), b in zip(own.net.named_parameters(), other.net.parameters(), strict=True):
        assert torch.equal(a, b), name
