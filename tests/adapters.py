"""Tiny models with LoRA adapters, for tests that have peft."""

import functools
from importlib.util import find_spec
from unittest import mock

import pytest
import torch
from torch import nn

import localprop
from localprop.division import divide
from tiny import SIZE, build

WHY = "LoRA needs peft: pip install 'localprop[lora]'"
needs_peft = pytest.mark.skipif(not find_spec("peft"), reason=WHY)


def adapted(name, rank=2, **options):
    """A tiny model with adapters that have been trained a little, so that they add something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = localprop.add_lora(build(name), rank, input_size=SIZE, **options)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(parameter, std=0.05)
    return model


@functools.cache
def chain_of(name):
    """The chain of a tiny model with adapters; it serves every copy."""
    return localprop.chain(adapted(name), SIZE)


def adapted_network(name, **options):
    """A tiny model with adapters as a network, with the same weights each time."""
    model = adapted(name)
    torch.manual_seed(1)
    with mock.patch.object(divide, "chain", return_value=chain_of(name)):
        return localprop.localize(model, input_size=SIZE, **options).train()
