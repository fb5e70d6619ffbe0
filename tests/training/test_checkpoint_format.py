"""What a checkpoint's files hold comes back bit for bit, and weights are readable by others."""

import os
import random
import struct
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from checkpoint_states import bits, names
from localprop.errors import CheckpointError
from localprop.training.checkpoints.format import save_weights
from localprop.training.checkpoints.loading import load_checkpoint
from localprop.training.checkpoints.saving import save_checkpoint

DTYPES = "float64 float32 float16 bfloat16 bool int64 int32 int16 int8 uint8"


NASTY = {
    "dtypes": {name: torch.arange(-3, 9).to(getattr(torch, name)) for name in DTYPES.split()},
    "scalar": torch.tensor(2.5),
    "empty": [torch.empty(0), torch.empty(3, 0, 2, dtype=torch.bfloat16)],
    "transposed": torch.arange(12.0).reshape(3, 4).t(),
    "channels last": torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
    "strided": torch.arange(10)[1::3],
    "expanded": torch.ones(1, 3).expand(4, 3),
    "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
    "payload": torch.tensor([0x7FC01234, -1, 0x7F800001], dtype=torch.int32).view(torch.float32),
    "parameter": nn.Parameter(torch.randn(2, 2)),
    "state": {0: {"step": torch.tensor(3.0)}, 1: {}, -7: None},
    "mixed keys": {0: torch.zeros(1), "0": torch.ones(1), "": 1},
    "colliding": {"a/b": torch.zeros(1), "a": {"b": torch.ones(1)}},
    "looks like a tag": {"$tensor": "x", "$tuple": [1], "$dict": [], "$float": "nan"},
    "tagged later": {"a": 1, "$float": "nan"},
    "__metadata__": torch.ones(2),
    "betas": (0.9, (0.999, [1, (), []]), {}),
    "floats": [float("inf"), float("-inf"), float("nan"), -0.0, 0.1, 1e-323, 1.0, 1e22, 2**53 + 1.0],
    "plain": [None, True, False, 0, 1, -(2**70), "", "ü\n\0\u2028", "nan", torch.bfloat16, torch.Size([2, 3])],
}


def test_nasty_structure_comes_back_bit_for_bit(tmp_path):
    parts = {"module-10": NASTY, "module-2": torch.ones(3), "scaler": {}, "lone": None}
    meta = {"epoch": 3, "best": float("-inf"), "by module": {0: (1, 2)}, "config": {"lr": 1e-3}}
    path = save_checkpoint(tmp_path, 1234, parts, meta, keep=2)
    assert path == tmp_path / "step-00001234"
    assert names(path) == sorted(["SHA256SUMS", "manifest.json", *(f"{name}.safetensors" for name in parts)])
    loaded = load_checkpoint(path)
    assert (loaded.step, loaded.path) == (1234, path)
    assert bits(loaded.meta) == bits(meta)
    assert list(loaded.parts) == sorted(parts)
    for name, part in parts.items():
        assert bits(loaded.parts[name]) == bits(part), name


def random_value(rng: random.Random, depth: int):
    kind = rng.randrange(10 if depth else 7)
    if kind < 3:
        dtype = rng.choice([torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.float16])
        shape = [rng.randrange(4) for _ in range(rng.randrange(4))]
        raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
        return (raw.view(dtype) if raw.numel() else torch.empty(*shape, 1, dtype=dtype)).squeeze(-1)
    if kind == 3:
        return struct.unpack("d", rng.randbytes(8))[0]
    if kind == 4:
        return rng.choice([None, True, False, rng.randrange(-(10**20), 10**20)])
    if kind < 7:
        return "".join(chr(rng.randrange(1, 0xD800)) for _ in range(rng.randrange(5)))
    size = rng.randrange(5)
    if kind == 9:
        keys = [rng.choice([rng.randrange(3), rng.choice("01$a/"), "$tensor", "a/0"]) for _ in range(size)]
        return {key: random_value(rng, depth - 1) for key in keys}
    return (list, tuple)[kind - 7](random_value(rng, depth - 1) for _ in range(size))


def test_random_structures_come_back_bit_for_bit(tmp_path):
    rng = random.Random(0)
    torch.manual_seed(0)
    parts = {f"part-{index:03}": [random_value(rng, 4) for _ in range(4)] for index in range(100)}
    loaded = load_checkpoint(save_checkpoint(tmp_path, 1, parts, {}, keep=1))
    assert bits(loaded.parts) == bits(parts)


def test_tensors_that_share_memory_are_saved_each(tmp_path):
    whole = torch.arange(10.0)
    part = {"whole": whole, "slice": whole[2:4], "again": whole, "bytes": whole.view(torch.uint8)}
    loaded = load_checkpoint(save_checkpoint(tmp_path, 1, {"part": part}, {}, keep=1)).parts["part"]
    assert bits(loaded) == bits(part)
    loaded["whole"].zero_()
    assert bits(loaded["again"]) == bits(whole)


def test_loaded_tensors_own_their_memory(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"part": [torch.ones(1, dtype=torch.uint8), torch.ones(4096)]}, {}, keep=1)
    tensors = load_checkpoint(path).parts["part"]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)  # as torch allocates, unlike the file
    with (path / "part.safetensors").open("r+b") as file:
        file.write(bytes(file.seek(0, os.SEEK_END)))
    assert all(tensor.eq(1).all() for tensor in tensors)


REFUSED = [{1, 2}, {1.5: 0}, {True: 0}, Path("x"), 1j, torch.zeros(1, dtype=torch.cfloat)]


@pytest.mark.parametrize("value", REFUSED, ids=str)
def test_what_cannot_come_back_exactly_is_refused(tmp_path, value):
    with pytest.raises(CheckpointError, match=r"cannot save the .* at module-0/deep/0") as caught:
        save_checkpoint(tmp_path, 1, {"module-0": {"deep": [value]}}, {}, keep=1)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_tensors_made_of_others_come_back(tmp_path):
    inner = TwoTensor(torch.arange(6.0).reshape(2, 3), torch.zeros(2, 3))
    value = TwoTensor(inner, TwoTensor(torch.ones(2, 3), torch.full((2, 3), float("nan"))))
    path = save_checkpoint(tmp_path, 1, {"part": {"moment": value, "same place": inner.a}}, {}, keep=1)
    loaded = load_checkpoint(path).parts["part"]["moment"]
    assert type(loaded) is type(loaded.a) is TwoTensor
    assert (loaded.shape, loaded.stride()) == (value.shape, value.stride())
    for pair, own in ((loaded.a, value.a), (loaded.b, value.b)):
        assert bits([pair.a, pair.b]) == bits([own.a, own.b])
    with pytest.raises(CheckpointError, match="at meta/best/a"):
        save_checkpoint(tmp_path, 2, {}, {"best": inner}, keep=1)


def test_a_file_does_not_choose_what_is_imported(tmp_path):
    class Gone(TwoTensor):
        pass

    Gone.__module__ = "this.library"  # importing it would print a poem
    parts = {"module-0": Gone(torch.ones(2), torch.ones(2)), "backbone": {}}
    path = save_checkpoint(tmp_path, 1, parts, {}, keep=1)
    Gone.__module__ = __name__
    with pytest.raises(CheckpointError, match=r"holds a this\.library\..*Gone, which is not loaded; install") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert "this" not in sys.modules
    assert load_checkpoint(path, only=["backbone"]).parts == {"backbone": {}}


def test_tensor_in_meta_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="Tensor at meta/best"):
        save_checkpoint(tmp_path, 1, {}, {"best": torch.ones(1)}, keep=1)
    assert list(tmp_path.iterdir()) == []


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 6, bias=False)
        self.head = nn.Linear(4, 6)
        self.head.weight = self.embed.weight


def test_tied_weights_survive(tmp_path):
    net = Tied()
    save_weights(tmp_path / "model.safetensors", net.state_dict())
    other = Tied()
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert other.head.weight is other.embed.weight
    assert bits(other.state_dict()) == bits(net.state_dict())


def test_timm_reads_the_weights(tmp_path):
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    net = timm.create_model("vit_tiny_patch16_224", **options).eval()
    path = tmp_path / "run" / "model.safetensors"
    path.parent.mkdir()
    save_weights(path, net.state_dict(), {"model": "vit", "ä": '"\\\n\x7f'})
    loaded = timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(path), **options).eval()
    images = torch.randn(2, 3, 16, 16)
    assert bits(loaded(images)) == bits(net(images))
    fresh = timm.create_model("vit_tiny_patch16_224", **options)
    fresh.load_state_dict(load_file(path), strict=True)
    assert bits(dict(fresh.state_dict())) == bits(dict(net.state_dict()))
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"model": "vit", "ä": '"\\\n\x7f'}
    assert names(tmp_path / "run") == ["model.safetensors"]


def test_same_weights_give_the_same_file(tmp_path):
    metadata = {key: key.upper() for key in ["the", "order", "of", "these", "would", "vary"]}
    files = [tmp_path / f"{index}.safetensors" for index in range(8)]
    for file in files:
        save_weights(file, {"weight": torch.arange(5.0), "bias": torch.zeros(2)}, metadata)
    assert len({file.read_bytes() for file in files}) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_tensors(tmp_path):
    part = {
        "a": torch.randn(3, 4, device="cuda").t(),
        "b": [torch.ones((), device="cuda", dtype=torch.bfloat16)],
    }
    path = save_checkpoint(tmp_path, 1, {"module-0": part}, {}, keep=1)
    for device in ("cpu", "cuda"):
        loaded = load_checkpoint(path, device).parts["module-0"]
        assert {loaded["a"].device.type, loaded["b"][0].device.type} == {device}
        assert bits(loaded) == bits(part)
