"""Why a part of a model stays whole is kept with the chain: what its forward does, where, and what helps."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from localprop.cli import main
from localprop.errors import ChainError
from localprop.tracing.chains import chain

SIZE = (3, 16, 16)


class Output(OrderedDict):
    """A container of results that looks at its first value, as those of transformers do."""

    def __init__(self, hidden):
        super().__init__(hidden=hidden)
        self.pairs = [pair for pair in hidden]  # noqa: C416, the line that is named


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3))

    def forward(self, hidden):
        for layer in self.layer:
            hidden = layer(hidden)
        return Output(hidden)


class Embeddings(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)

    def forward(self, x):
        return self.patches(x).flatten(2).transpose(1, 2)


class Distilled(nn.Module):
    """Built as DistilBERT is: embeddings, an encoder that gives a container of results, and a classifier."""

    def __init__(self):
        super().__init__()
        self.embeddings, self.transformer, self.classifier = Embeddings(), Encoder(), nn.Linear(8, 5)

    def forward(self, x):
        return self.classifier(self.transformer(self.embeddings(x))["hidden"][:, 0])


class PerImage(nn.Sequential):
    def forward(self, x):
        return torch.stack([self[1](image) for image in self[0](x)])


class WithoutGradient(nn.Sequential):
    def forward(self, x):
        with torch.no_grad():
            x = self[0](x)
        return self[1](x)


class OwnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


class Custom(nn.Sequential):
    def forward(self, x):
        return self[1](OwnFunction.apply(self[0](x)))


class Checking(nn.Sequential):
    def forward(self, x):
        if not isinstance(x, torch.Tensor):
            raise TypeError("no tensor")
        return self[1](self[0](x))


class EvalOnly(nn.Sequential):
    def forward(self, x):
        x = self[0](x)
        return self[1](x) if self.training else torch.stack([self[1](image) for image in x])


def convs(kind):
    """A model of three parts of which the middle one is of this kind."""
    conv = nn.Conv2d(8, 8, 3, padding=1)
    middle = kind(conv, nn.Conv2d(8, 8, 3, padding=1))
    return nn.Sequential(nn.Conv2d(3, 8, 3), middle, nn.Flatten(), nn.Linear(8 * 14 * 14, 5))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (PerImage, ["its control flow depends on the size of the batch", "for image in self[0](x)"]),
        (WithoutGradient, ["it switches no_grad or autocast around blocks", "x = self[0](x)"]),
        (Custom, ["or calls an autograd function of its own", "return x * 2"]),
        (Checking, ["its forward fails when it is traced (TypeError: no tensor)", "raise TypeError"]),
    ],
)
def test_what_stopped_the_tracing_is_named_with_its_line(kind, words):
    units = chain(convs(kind), SIZE)
    assert [unit.name for unit in units] == ["0", "1", "3"]
    assert units.whole.keys() == {"1"}
    reason = units.whole["1"]
    assert all(word in reason for word in words), reason
    assert "of test_whole_parts.py" in reason
    assert "move that code into a module of its own" in reason
    assert "\n" not in reason


def test_a_part_that_stays_whole_in_one_mode_says_which():
    units = chain(convs(EvalOnly), SIZE)
    assert [unit.name for unit in units] == ["0", "3"]
    assert units.whole.keys() == {"1", "3"}
    assert units.whole["1"].endswith("(in eval mode)")
    assert units.whole["3"] == "1 stays whole in eval mode"


def test_an_encoder_that_gives_a_container_of_results_is_one_unit_and_says_why():
    units = chain(Distilled(), SIZE)
    assert [unit.name for unit in units] == ["embeddings", "transformer", "classifier"]
    assert units.whole.keys() == {"transformer"}
    assert "its control flow depends on the size of the batch in line" in units.whole["transformer"]
    assert "self.pairs = [pair for pair in hidden]" in units.whole["transformer"]


def test_a_model_that_is_cut_everywhere_has_no_reasons():
    assert chain(convs(nn.Sequential), SIZE).whole == {}


def test_of_a_part_within_a_whole_part_nothing_is_said():
    class Outer(nn.Sequential):
        def forward(self, x):
            return torch.stack(list(self[1](self[0](x))))

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Outer(nn.Conv2d(8, 8, 1), convs(PerImage)[1]), nn.Conv2d(8, 5, 14))
    assert chain(model, SIZE).whole.keys() == {"1"}


class TwoStreams(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc((self.c(self.a(x)) + self.b(x)[..., 1:-1, 1:-1]).mean((2, 3)))


def test_blocks_between_which_several_tensors_cross_say_which():
    units = chain(TwoStreams(), SIZE)
    assert [unit.name for unit in units] == ["b", "fc"]
    assert units.whole == {"b": "2 tensors cross after a, made by the image, a; a cut needs a single one"}


def test_blocks_that_share_parameters_say_so():
    shared = nn.Linear(8, 8)
    units = chain(nn.Sequential(nn.Flatten(), nn.Linear(768, 8), shared, nn.Tanh(), shared, nn.Linear(8, 5)), SIZE)
    assert units.whole == {}  # one layer, called twice: there is nothing to cut between
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    units = chain(nn.Sequential(nn.Flatten(), nn.Linear(768, 8), first, nn.Tanh(), second, nn.Linear(8, 5)), SIZE)
    assert units.whole == {"4": "parameters are used both up to 2 and after it; give each side its own, if that may be"}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.b(self.a(x)) + x


class Residual(Block):
    def forward(self, x):
        y = self.a(x)
        return self.b(y) + y + x


class Counting(Block):
    def forward(self, x):
        self.calls = x.shape
        return super().forward(x)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Counting, "it sets attributes of its own"),
        (Residual, "2 tensors cross after a, made by 1, a; a cut needs a single one"),
        (lambda: nn.TransformerEncoderLayer(8, 2, 16), "computes otherwise without gradients"),
    ],
)
def test_a_block_that_cannot_be_split_says_why(kind, reason):
    blocks = nn.Sequential(kind(), kind())
    model = nn.Sequential(nn.Flatten(2), nn.Linear(256, 8), blocks, nn.Flatten(), nn.Linear(24, 5))
    assert chain(model, SIZE).whole == {}
    whole = chain(model, SIZE, split_blocks=True).whole
    assert whole.keys() == {"2.0", "2.1"}
    assert reason in whole["2.0"]


def test_what_a_model_cannot_be_traced_for_at_all_is_named_with_its_line():
    class Branch(nn.Sequential):
        def forward(self, x):
            return self[0](x) if x.mean() > 0 else self[1](x)

    with pytest.raises(ChainError, match=r"depends on pixel values .* in line \d+ of test_whole_parts.py") as caught:
        chain(convs(Branch), SIZE)
    assert "if x.mean() > 0" in str(caught.value)


class Calls(nn.Sequential):
    """Sets its buffer, and runs its blocks."""

    def __init__(self, *blocks):
        super().__init__(*blocks)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return super().forward(x)


def test_a_forward_that_is_traced_sets_no_buffer_for_a_graph_does_not():
    layers = [nn.Flatten(), nn.Linear(768, 8), nn.Linear(8, 5)]
    with pytest.raises(ChainError, match="it sets its buffer calls to another tensor, which cannot be traced; move"):
        chain(Calls(*layers), SIZE)
    inner = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), Calls(Block(), Block()), nn.Linear(8, 5))
    units = chain(inner, SIZE)
    assert units.whole["2"].startswith("it sets its buffer calls")
    assert [unit.name for unit in units] == ["1", "2", "3"]


def test_the_command_prints_each_reason_once(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["chain", "test_vit"]) == 0
    assert "not cut inside" not in capsys.readouterr().out
    assert main(["chain", "resnet18", "--img-size", "32", "--split-blocks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if "why it is not cut inside" in line)
    assert any("layer2.0" in line and "2 tensors cross after conv1, made by" in line for line in lines[start:])
