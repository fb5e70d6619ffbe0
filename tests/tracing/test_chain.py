"""The chain's units, run in order, are the backbone: bit for bit, in train and eval mode, for the models promised."""

import copy
import random

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backbones import IMAGE, OTHERS, RATES, TIMM, assert_equal, cut, through_units, trained
from localprop.errors import ChainError
from localprop.tracing.chains import chain
from tiny import units_of


@pytest.mark.parametrize("name", [*TIMM, *OTHERS])
def test_units_are_the_model_in_eval_mode(name):
    model, units = cut(name)
    model.eval()
    images = torch.randn(3, *IMAGE)
    with torch.no_grad():
        assert torch.equal(model(images), through_units(model, units, images))


@pytest.mark.parametrize("name", [*TIMM, *OTHERS])
def test_units_are_the_model_in_train_mode(name):
    model, units = cut(name)
    model.train()
    images = torch.randn(3, *IMAGE)
    expected = trained(model, model, images)
    assert_equal(expected, trained(model, lambda x: through_units(model, units, x), images))
    with_gradient = {key.removeprefix("gradient of ") for key in expected if key.startswith("gradient")}
    used = [name for unit in units for name in unit.parameters]
    assert len(used) == len(set(used))
    assert with_gradient <= set(used) <= {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("name", [*TIMM, *OTHERS])
def test_units_are_the_blocks(name):
    _, units = cut(name)
    names = [unit.name for unit in units]
    assert len(names) == (TIMM | OTHERS)[name][0], names
    assert len(set(names)) == len(names)
    assert units.names() == ", ".join(names)


@pytest.mark.parametrize("name", ["pvt_v2_b0", "vit_small_patch16_dinov3", "swin_tiny_patch4_window7_224"])
@pytest.mark.parametrize("batch", [1, 5])
def test_any_batch_size(name, batch):
    model, units = cut(name)
    model.eval()
    images = torch.randn(batch, *IMAGE)
    with torch.no_grad():
        assert torch.equal(model(images), through_units(model, units, images))


def test_cutting_leaves_the_model_as_it_was():
    model = timm.create_model("resnet18", **RATES)
    model.layer1.eval()
    model.layer2.requires_grad_(False)
    calls = []
    model.layer3[0].register_forward_hook(lambda *_: calls.append("hook"))

    def state():
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        facts = [(name, id(t), t.requires_grad, t.grad) for name, t in tensors.items()]
        flags = [module.training for module in model.modules()]
        return (facts, flags, torch.get_rng_state().tolist(), random.getstate())

    before, weights = state(), copy.deepcopy(model.state_dict())
    chain(model, IMAGE)
    assert state() == before
    assert_equal(weights, model.state_dict())
    assert calls == []


def test_hooks_on_blocks_and_layers_run():
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2)
    calls = []
    model.blocks[0].register_forward_hook(lambda *_: calls.append("before"))
    units = chain(model)
    model.blocks[1].attn.qkv.register_forward_hook(lambda *_: calls.append("after"))
    through_units(model, units, torch.randn(1, *IMAGE))
    assert calls == ["before", "after"]


class _Alive(TorchDispatchMode):
    """Counts the bytes of the tensors made under it that are still there; those that are views of `known` are not."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def bytes(self):
        return sum(size for reference, size in self.storages.values() if not reference.expired())


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_tiny"])
def test_gradient_checkpointing(name, when):
    model = timm.create_model(name, **TIMM[name][1], **RATES)
    images = torch.randn(2, *IMAGE)
    plain_units = chain(model, IMAGE)
    plain = trained(model, lambda x: through_units(model, plain_units, x), images)
    model.set_grad_checkpointing()
    units = chain(model, IMAGE) if when == "before" else plain_units
    assert units.names() == plain_units.names()
    assert_equal(plain, trained(model, lambda x: through_units(model, units, x), images))

    def kept(unit, features):
        with _Alive([features, *model.parameters(), *model.buffers()]) as alive:
            output = unit(model, features, {})
        return alive.bytes() - output.untyped_storage().nbytes()

    features = through_units(model, units[:3], images).detach().requires_grad_()
    with_checkpointing = kept(units[3], features)
    model.set_grad_checkpointing(False)
    assert with_checkpointing < 0.05 * kept(units[3], features)


def test_a_copy_of_model_and_chain_stands_alone():
    model, units = cut("vit_tiny_patch16_224")
    twin, twin_units = copy.deepcopy((model, units))
    model.eval(), twin.eval()
    images = torch.randn(2, *IMAGE)
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(through_units(twin, twin_units, images), expected)
        twin.blocks[0].mlp.fc1.weight.mul_(2)
        assert not torch.equal(through_units(twin, twin_units, images), expected)
        assert torch.equal(through_units(model, units, images), expected)


@pytest.mark.parametrize("when", ["before", "after"])
def test_low_precision_weights(when):
    model = timm.create_model("swin_tiny_patch4_window7_224", **TIMM["swin_tiny_patch4_window7_224"][1], **RATES)
    model = model.bfloat16() if when == "before" else model
    units = chain(model)
    model.bfloat16().eval()
    images = torch.randn(2, *IMAGE, dtype=torch.bfloat16)
    output = through_units(model, units, images)
    assert output.dtype == torch.bfloat16
    assert torch.equal(model(images), output)


def test_mixed_precision():
    model, units = cut("swin_tiny_patch4_window7_224")
    images = torch.randn(2, *IMAGE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(
            trained(model.train(), model, images),
            trained(model, lambda x: through_units(model, units, x), images),
        )


@pytest.mark.parametrize("frozen_when_cut", [True, False])
def test_frozen_parameters(frozen_when_cut):
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, **RATES)
    frozen = [model.pos_embed, *model.blocks[0].parameters()]
    for parameter in frozen:
        parameter.requires_grad_(not frozen_when_cut)
    units = chain(model)
    for parameter in frozen:
        parameter.requires_grad_(frozen_when_cut)
    images = torch.randn(2, *IMAGE)
    result = trained(model, lambda x: through_units(model, units, x), images)
    assert_equal(trained(model, model, images), result)
    assert ("gradient of pos_embed" in result) == frozen_when_cut


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: timm.create_model("resnet18", in_chans=1), (1, 224, 224)),
        (lambda: timm.create_model("tresnet_m"), (3, 224, 224)),  # its first layer has 48 channels
        (lambda: timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), depth=1), (3, 32, 48)),
        (lambda: nn.Sequential(nn.Identity(), timm.create_model("vit_tiny_patch16_224", depth=1)), (3, 224, 224)),
        (lambda: torchvision.models.vit_b_16(image_size=32), (3, 32, 32)),
        (lambda: torchvision.models.resnet18(), (3, 224, 224)),
    ],
)
def test_input_size_is_the_models_own(make, size):
    assert chain(make()).input_size == size


DEPTHS = {
    "swin": [0, 1, 1, 0, 1, 0],  # a stem, blocks, a downsampling between them, the classifier
    "vit": [0, 1, 1, 1, 1, 0],
    "resnet": [0, 1, 1, 1, 1, 0],  # a stage of one block each
    "mlp": [1, 1, 1, 1],  # no lists of blocks
}


@pytest.mark.parametrize("name", DEPTHS)
def test_depth_is_the_number_of_blocks(name):
    assert [unit.depth for unit in units_of(name)] == DEPTHS[name]


def test_positions_by_name():
    _, units = cut("swin_tiny_patch4_window7_224")
    names = [unit.name for unit in units]
    assert units.position("patch_embed") == 1
    assert units.position("layers.2.blocks.0") == names.index("layers.2.blocks.0") + 1
    assert units.position("layers.1") == names.index("layers.1.blocks.0") + 1
    assert units.position("layers") == len(names) - 1
    with pytest.raises(ChainError, match=r"no unit is called 'layer\.1'; did you mean 'layers\.1'\?$"):
        units.position("layer.1")
