"""What people do with models: each works as in a plain loop, or is one line that says why not."""

import copy
import io
import multiprocessing
import pickle

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torchvision import transforms

from localprop import localize
from localprop.cli import main
from localprop.decoders import DECODERS
from localprop.errors import ChainError, ConfigError, LocalpropError
from localprop.heads import HEADS
from localprop.planning.simulation import simulate_step
from localprop.runs.experiment import prepare
from localprop.settings.config import OptimConfig
from localprop.settings.flat import from_flat
from localprop.tracing.constants import KeepConstants
from localprop.training.state import TrainingState
from tiny import MODELS, SIZE, batch, build, split

CPU = torch.device("cpu")


def one_line(function, *arguments, kind=LocalpropError, **options):
    with pytest.raises(kind) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class LoRA(nn.Module):
    """A frozen linear layer with a trained low-rank one beside it."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / 10)
        self.up = nn.Parameter(torch.randn(base.out_features, rank) / 10)

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


def add_lora(model):
    torch.manual_seed(5)
    for block in model.blocks:
        block.attn.qkv = LoRA(block.attn.qkv)


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).transpose(-1, -2)


def parametrize_some(model):
    parametrize.register_parametrization(model.blocks[0].attn.proj, "weight", Symmetric())
    parametrizations.weight_norm(model.head)
    parametrize.register_parametrization(model, "pos_embed", nn.Tanh())


def plain_loop(model, optimizer, steps):
    for seed in range(steps):
        images, labels = batch(seed=seed)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def local_loop(net, optimizers, steps):
    for seed in range(steps):
        net.backward(*batch(seed=seed))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("change", [add_lora, parametrize_some])
@pytest.mark.parametrize("split_blocks", [False, True])
def test_adapters_added_after_localize_are_trained_as_in_a_plain_loop(change, split_blocks):
    models = [build("vit").eval() for _ in range(2)]  # eval: no dropout
    net = localize(models[0], 1, "end-to-end", input_size=SIZE, split_blocks=split_blocks)
    for model in models:
        change(model)
    own = dict(net.local_modules[0].named_parameters())
    assert list(own) == [name for name, _ in models[0].named_parameters()]
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad]) for m in (models[1],)]
    plain_loop(models[1], optimizers[0], 3)
    local_loop(net, [torch.optim.AdamW([p for p in own.values() if p.requires_grad])], 3)
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(net(batch()[0]), models[1](batch()[0]))


@pytest.mark.parametrize("change", [add_lora, parametrize_some])
def test_each_module_has_its_share_of_adapters(change):
    net = split("vit", method="greedy")
    change(net.backbone)
    state = TrainingState(net, OptimConfig(), 10, CPU)
    names = [name for module in net.local_modules for name, _ in module.named_parameters() if "auxiliary" not in name]
    assert sorted(names) == sorted(name for name, _ in net.backbone.named_parameters())
    assert sorted(name for share in net.shares() for name in share) == sorted(net.backbone.state_dict())
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    state.train_step(list(batch()), seed=0)
    for name, parameter in net.named_parameters():
        assert torch.equal(before[name], parameter) != parameter.requires_grad, name
    parts = state.parts()
    again = split("vit", method="greedy")
    change(again.backbone)
    TrainingState(again, OptimConfig(), 10, CPU).load(parts, 1)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_a_part_that_is_gone_is_one_line():
    net = split("vit", method="greedy")
    net.backbone.blocks[1] = nn.Identity()  # the unit calls it still
    list(net.local_modules[0].parameters())
    del net.backbone.blocks[3]
    assert "call localize again" in one_line(list, net.local_modules[2].parameters(), kind=ChainError)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_a_frozen_module_only_runs(frozen, whole):
    nets = [split("vit", method="greedy") for _ in range(2)]
    share = nets[0].local_modules[frozen].named_parameters()
    for name, parameter in share:
        if whole or not name.startswith("auxiliary"):
            parameter.requires_grad_(False)
    states = [TrainingState(net.train(), OptimConfig(clip_grad=1.0), 10, CPU) for net in nets]
    before = [p.detach().clone() for p in nets[0].local_modules[frozen].parameters()]
    losses = [state.train_step(list(batch()), seed=0) for state in states]
    assert torch.equal(*losses)  # none depends on what a later step changes
    for a, b in zip(before, nets[0].local_modules[frozen].parameters(), strict=True):
        assert torch.equal(a, b)
        assert b.grad is None
    for k in {0, 1, 2} - {frozen}:
        for a, b in zip(*(net.local_modules[k].parameters() for net in nets), strict=True):
            assert torch.equal(a, b)
    for _ in range(2):
        states[0].train_step(list(batch()), seed=0)
    assert states[0].parts()


@pytest.mark.parametrize("precision", [{}, {"amp": True, "amp_dtype": "float16"}])
def test_a_network_with_a_frozen_module_can_be_planned_and_cut(precision):
    model = build("vit")
    model.patch_embed.requires_grad_(False)
    for block in model.blocks[:2]:
        block.requires_grad_(False)
    for parameter in (model.cls_token, model.pos_embed):
        parameter.requires_grad_(False)
    net = localize(model, 2, "greedy", input_size=SIZE)
    assert net.local_modules[0].frozen or not net.local_modules[1].frozen
    net = localize(model, method="greedy", cuts=["blocks.1"], input_size=SIZE)
    assert [module.frozen for module in net.local_modules] == [True, False]
    trace = simulate_step(net, OptimConfig(**precision), 4, SIZE)
    assert trace.peak > 0
    state = TrainingState(net.train(), OptimConfig(**precision), 10, CPU)
    state.train_step(list(batch()), seed=0)
    images = batch()[0]
    assert net.local_modules[0](images, {}).shape == (4, 65, 48)


def test_all_of_a_model_frozen_is_no_error():
    net = localize(build("mlp").requires_grad_(False), 1, "end-to-end", input_size=SIZE)
    losses = net.backward(*batch()).losses
    assert losses.isfinite().all()
    assert all(parameter.grad is None for parameter in net.parameters())


def test_batch_norm_on_a_single_value_is_one_line():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))
    net = localize(model, 1, "end-to-end", input_size=SIZE)
    line = one_line(net.backward, *batch(1), kind=ConfigError)
    assert "batch norm" in line
    assert "has 1 image;" in line
    net.eval()
    assert net.backward(*batch(1)).losses.isfinite().all()
    net = localize(build("resnet"), method="greedy", cuts=["layer2"], input_size=SIZE)  # 1 x 1 pixel at its end
    assert "batch norm" in one_line(net.backward, *batch(1), kind=ConfigError)
    assert "batch norm" in one_line(simulate_step, net, OptimConfig(micro_batches=4), 4, SIZE, kind=ConfigError)
    # Units that a head reads ahead are the next module's.
    net = localize(build("resnet"), method="greedy", cuts=["layer2"], reach=1, input_size=SIZE)
    assert one_line(net.backward, *batch(1), kind=ConfigError).startswith("module 2 of 2 (layer3.0 ")
    plain = build("cnn")
    net = localize(copy.deepcopy(plain), 1, "end-to-end", input_size=SIZE, criterion=F.cross_entropy)
    torch.manual_seed(3)
    images, labels = batch(1)  # several pixels, and so several values
    loss = F.cross_entropy(plain(images), labels)
    torch.manual_seed(3)
    assert torch.equal(net.backward(images, labels).losses[0], loss.detach())


def test_a_partition_for_batches_of_one_image():
    options = {"input_size": SIZE, "batch_size": 1}
    assert localize(build("cnn"), 2, "greedy", **options)
    assert localize(build("resnet"), method="greedy", cuts=["layer2"], **options)  # no cost is needed
    assert "unit layer4" in one_line(localize, build("resnet"), 2, "greedy", kind=ConfigError, **options)


def test_images_of_another_size_are_one_line():
    net, images = split("vit", method="greedy"), torch.randn(4, 3, 48, 48)
    labels = batch()[1]
    for call in (net, net.module_predictions, lambda images: net.backward(images, labels)):
        assert "images of 3x32x32, and these have 3x48x48" in one_line(call, images, kind=ChainError)
    state = TrainingState(net, OptimConfig(), 10, CPU)
    assert "3x48x48" in one_line(state.train_step, [images, labels], seed=0, kind=ChainError)
    assert "3x32" in one_line(net, batch()[0][0], kind=ChainError)  # no batch axis
    for name in MODELS:
        assert "1x32x32" in one_line(split(name, method="greedy"), torch.randn(2, 1, 32, 32), kind=ChainError)


def test_a_model_without_classifier_is_one_line():
    model = timm.create_model("resnet18", num_classes=0, layers=(1, 1, 1, 1), channels=(8, 8, 8, 8))
    assert "num_classes=0" in one_line(localize, model, 2, "greedy", input_size=SIZE, kind=ChainError)
    assert "num_classes=0" in one_line(localize, build("cnn"), 2, input_size=SIZE, num_classes=0, kind=ChainError)


def test_normalize_in_a_model_is_part_of_it():
    def made():
        torch.manual_seed(0)
        return nn.Sequential(
            transforms.Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)),
            *(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
        )

    models = [made(), made()]
    net = localize(models[0], 1, "end-to-end", input_size=SIZE)
    images = batch(7)[0]
    assert torch.equal(net(images), models[1](images))
    plain_loop(models[1], torch.optim.SGD(models[1].parameters(), 0.1), 2)
    local_loop(net, [torch.optim.SGD(net.local_modules[0].parameters(), 0.1)], 2)
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))
    two = localize(made(), 2, "greedy", input_size=SIZE)
    assert torch.equal(two(images), made()(images))
    assert simulate_step(two, OptimConfig(), 4, SIZE).peak > 0


def test_only_small_constants_keep_their_values():
    with FakeTensorMode(), KeepConstants():
        assert (torch.tensor([0.0, 1.0]) == 0).any()
        assert isinstance(torch.tensor(np.zeros(3000)), FakeTensor)
        assert isinstance(torch.tensor(data=[0.0] * 3000), FakeTensor)
        assert isinstance(torch.ones(2), FakeTensor)


@pytest.mark.parametrize("name", MODELS)
def test_a_network_is_pickled_and_copied_with_torch(name):
    net = split(name, method="feature-reconstruction").eval()
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    images = batch()[0]
    for other in (torch.load(file, weights_only=False), copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert other.local_modules[0]._backbone[0] is other.backbone
        for a, b in zip(net.module_predictions(images), other.module_predictions(images), strict=True):
            assert torch.equal(a, b)
        before = [p.detach().clone() for p in net.parameters()]
        state = TrainingState(other.train(), OptimConfig(), 10, CPU)
        state.train_step(list(batch()), seed=0)
        assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
        assert not torch.equal(next(other.parameters()), before[0])


@pytest.mark.parametrize("method", ["feature-reconstruction", "infopro", "greedy"])
def test_every_auxiliary_net_can_be_pickled(method):
    for decoder, head in zip(DECODERS, list(HEADS) * 2, strict=False):
        net = split("cnn", method=method, decoder=decoder, head=head)
        assert pickle.loads(pickle.dumps(net))


def test_the_network_of_a_run_can_be_pickled():
    small = {"patch_size": 4, "window_size": 2, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)}
    config = from_flat({"model_kwargs": small, "device": "cpu", "cuts": ["layers.0"], "modules": 2}, "here")
    net = prepare(config).localize()
    images, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    losses = [n.eval().backward(images, labels).losses for n in (net, pickle.loads(pickle.dumps(net)))]
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--model resnet18 --model-kwargs layers=(1,1,1,1) channels=(8,8,8,8) --batch-size 1", "has a batch norm"),
        ("--model resnet18 --model-kwargs layers=(1,1,1,1) --batch-size 4 --micro-batches 4", "has a batch norm"),
        ("--model vit_tiny_patch16_224 --model-kwargs img_size=32 patch_size=8 --img-size 48", "images of 3x48x48"),
        ("--model resnet18 --model-kwargs num_classes=0", "num_classes=0: the data has 10"),
    ],
)
def test_a_run_says_so_in_one_line(flags, said, tmp_path, capsys):
    words = ["train", *flags.split(), "--modules", "2", "--method", "greedy", "--epochs", "1", "--device", "cpu"]
    assert main([*words, "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_plan_of_a_model_without_classifier_is_one_line(capsys):
    assert main(["plan", "--model", "resnet18", "--model-kwargs", "num_classes=0", "--img-size", "32"]) == 2
    assert "num_classes=0" in capsys.readouterr().err


def _work(net, queue):
    images = batch()[0]
    queue.put(net.eval()(images).detach().numpy())


def test_a_network_goes_to_a_spawned_process():
    context = multiprocessing.get_context("spawn")
    net, queue = split("vit", method="greedy").eval(), context.Queue()
    process = context.Process(target=_work, args=(net, queue))
    process.start()
    result = torch.from_numpy(queue.get(timeout=120))
    process.join(60)
    assert process.exitcode == 0
    assert torch.allclose(result, net(batch()[0]), atol=1e-5)  # threads of the child may round otherwise
