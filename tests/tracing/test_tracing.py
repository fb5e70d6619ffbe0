"""What forwards may do and still be cut, and what is said where they cannot."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from localprop.errors import ChainError
from localprop.tracing.chains import chain

SIZE = (3, 16, 16)


class Net(nn.Module):
    """Two convolutions and a classifier, from which the tests derive forwards of all kinds."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)
        self.shift = nn.Parameter(torch.randn(8, 1, 1))
        self.register_buffer("scale", torch.rand(8, 1, 1))
        self.table = torch.rand(8, 1, 1)  # neither parameter nor buffer

    def forward(self, x):
        return self.fc(self.b(self.a(x)).mean((2, 3)))


class LateSize(Net):
    def forward(self, x):  # the image is needed for its size alone
        y = F.avg_pool2d(self.b(self.a(x)), 16)
        return self.fc(y.view(x.size(0), -1))


class Constants(Net):
    def forward(self, x):
        x = (x - torch.tensor([0.1, 0.2, 0.3], device=x.device).view(3, 1, 1)) * math.sqrt(x.shape[1])
        y = self.a(x) * self.scale + self.table + torch.zeros(x.shape[0], 8, 1, 1, dtype=x.dtype)
        return self.fc((self.b(y) + torch.arange(y.shape[-1], device=y.device)).mean((2, 3)))


class InPlace(Net):
    def forward(self, x):
        y = self.a(x)
        alias = y
        y += self.shift
        y[:, 0] = 1.0
        return self.fc(self.b(alias).mul_(2).mean((2, 3)))


class SharedParameter(Net):
    def forward(self, x):  # ties both convolutions together
        y = self.a(x) + self.shift
        return self.fc((self.b(y) + self.shift).mean((2, 3)))


class Mask(Net):
    def forward(self, x):  # depends on pixels, but no gradient flows through it
        mask = x.amax(1, keepdim=True) > 0
        return self.fc((self.b(self.a(x)) * mask).mean((2, 3)))


class DictBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, state):
        return {"x": state["x"] + self.norm(self.conv(state["x"])), "size": state["size"]}


class Dicts(Net):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(DictBlock() for _ in range(3))

    def forward(self, x):
        state = {"x": self.a(x), "size": x.shape[-2:]}
        for block in self.blocks:
            state = block(state)
        assert state["size"] == (16, 16)
        return self.fc(state["x"].mean((2, 3)))


class Transformer(Net):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.token = nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, x):
        tokens = F.avg_pool2d(self.a(x), 4).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], dim=1)
        return self.fc(self.encoder(tokens)[:, 0])


class OptionalArgument(Net):
    def forward(self, x, scale=None):
        return super().forward(x if scale is None else x * scale)


class TwoStreams(Net):
    def forward(self, x):
        return self.fc((self.a(x) + self.b(F.pad(x, (0, 0, 0, 0, 0, 5)))).mean((2, 3)))


class WritesItsInput(nn.Conv2d):
    def forward(self, x):
        x += 1
        return super().forward(x)


def _writes_input():
    return nn.Sequential(nn.Conv2d(3, 8, 3), WritesItsInput(8, 8, 3), nn.Flatten(), nn.Linear(8 * 144, 5))


def _tied():
    shared = nn.Linear(8, 8)
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 8), shared, nn.Tanh(), shared, nn.Linear(8, 5))


def _weight_norm():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), nn.Flatten(), nn.Linear(8 * 196, 5))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (Net, ["a", "b", "fc"]),
        (LateSize, ["a", "b", "fc"]),
        (Constants, ["a", "b", "fc"]),
        (InPlace, ["a", "b", "fc"]),
        (SharedParameter, ["b", "fc"]),
        (Mask, ["a", "b", "fc"]),
        (Dicts, ["a", "blocks.0", "blocks.1", "blocks.2", "fc"]),
        (Transformer, ["a", "encoder.layers.0", "encoder.layers.1", "encoder.layers.2", "fc"]),
        (OptionalArgument, ["a", "b", "fc"]),
        (TwoStreams, ["b", "fc"]),
        (_writes_input, ["1", "3"]),
        (_tied, ["1", "2", "5"]),
        (_weight_norm, ["0", "2"]),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 5)), ["1"]),
        (lambda: nn.Flatten(), ["output"]),
    ],
)
def test_units_of(make, names):
    torch.manual_seed(0)
    model = make()
    units = chain(model, SIZE)
    assert [unit.name for unit in units] == names
    used = [name for unit in units for name in unit.parameters]
    assert len(used) == len(set(used))
    for training in (True, False):
        model.train(training)
        for batch in (2, 3, 5):
            images = torch.randn(batch, *SIZE)
            results = []
            for units_too in (False, True):
                torch.manual_seed(1)
                features, context = images, {}
                for unit in units if units_too else [lambda model, x, _: model(x)]:
                    features = unit(model, features, context)
                gradients = []
                if used:
                    gradients = torch.autograd.grad(
                        features.square().sum(), list(model.parameters()), allow_unused=True
                    )
                results.append([features.detach(), *(g for g in gradients if g is not None)])
            expected, actual = results
            assert len(expected) == len(actual)
            assert all(map(torch.equal, expected, actual))


@pytest.mark.parametrize("frozen", [True, False])
def test_a_parameter_belongs_to_the_unit_that_uses_it(frozen):
    class Early(Net):
        def forward(self, x):
            bias = self.shift.exp()
            return self.fc((self.b(self.a(x)) + bias).mean((2, 3)))

    model = Early()
    model.shift.requires_grad_(not frozen)
    units = chain(model, SIZE)
    assert [unit.name for unit in units if "shift" in unit.parameters] == ["b"]


def test_blocks_are_found_behind_activation_checkpointing():
    class Checkpointed(Net):
        grad_checkpointing = True

        def forward(self, x):
            y = self.a(x)
            y = checkpoint(self.b, y, use_reentrant=True) if self.grad_checkpointing else self.b(y)
            return self.fc(y.mean((2, 3)))

    assert [unit.name for unit in chain(Checkpointed(), SIZE)] == ["a", "b", "fc"]


def test_a_module_that_cannot_be_followed_stays_whole():
    class Loop(nn.Sequential):
        def forward(self, x):
            return torch.stack([self[1](image) for image in self[0](x)])  # a loop over the batch

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Loop(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)), nn.Conv2d(8, 5, 10))
    units = chain(model, SIZE)
    assert [unit.name for unit in units] == ["0", "1", "2"]
    calls = []
    model[1][0].register_forward_hook(lambda *_: calls.append("once"))
    images = torch.randn(4, *SIZE)
    features, context = images, {}
    for unit in units:
        features = unit(model, features, context)
    assert calls == ["once"]
    assert torch.equal(features, model(images))


class NeedsMask(Net):
    def forward(self, x, mask):
        return super().forward(x * mask)


class DependsOnPixels(Net):
    def forward(self, x):
        return super().forward(x * 2 if x.mean() > 0 else x)


class DependsOnBatch(Net):
    def forward(self, x):
        return super().forward(x * 2 if x.shape[0] % 2 else x)


class NoGrad(Net):
    def forward(self, x):
        with torch.no_grad():
            y = self.a(x)
        return self.fc(self.b(y).mean((2, 3)))


class HiddenLayer(Net):
    def __init__(self):
        super().__init__()
        self.hidden = [nn.Conv2d(3, 3, 1)]

    def forward(self, x):
        return super().forward(self.hidden[0](x))


class Invisible(Net):
    def forward(self, x):
        return super().forward(x + torch.as_tensor([[[1.0]]]))


class GivesDict(Net):
    def forward(self, x):
        return {"logits": super().forward(x)}


class GivesTuple(Net):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize(
    ("make", "why", "remedy"),
    [
        (NeedsMask, "missing 1 required positional argument: 'mask'", "that forward takes images alone"),
        (DependsOnPixels, "depends on pixel values", "keep such code out of the model"),
        (DependsOnBatch, "depends on the size of the batch", "move that code into a module of its own"),
        (NoGrad, "switches no_grad or autocast", "move that code into a module of its own"),
        (HiddenLayer, "calls a Conv2d that is no submodule", "move that code into a module of its own"),
        (Invisible, "makes a tensor in a way that does not show", "move that code into a module of its own"),
        (GivesDict, "gives a dict, not one tensor", "wrap the model"),
        (GivesTuple, "gives a tuple, not one tensor", "wrap the model"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(9, 5)), r"its forward fails \(RuntimeError", "check input_size"),
        (lambda: torch.compile(Net()), "cannot cut OptimizedModule", "that the model is not compiled"),
    ],
)
def test_what_cannot_be_cut_says_why_in_one_line(make, why, remedy, capfd):
    with pytest.raises(ChainError, match=why) as caught:
        chain(make(), SIZE)
    message = str(caught.value)
    assert message.startswith("cannot cut ")
    assert "for images of 3x16x16" in message
    assert remedy in message
    assert "\n" not in message
    assert capfd.readouterr() == ("", "")  # torch logs tracebacks of what fails on fake tensors


def test_a_model_of_unknown_input_size():
    with pytest.raises(ChainError, match=r"Net does not tell the size .* pass input_size=\(channels, height, width\)"):
        chain(Net())
