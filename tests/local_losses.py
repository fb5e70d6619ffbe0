"""Local losses for tests, each of a module of its own: 24 channels of 4 x 4 positions, 5 labels."""

import torch

from localprop import ModuleSpec
from localprop.features import Layout
from localprop.methods import build_loss
from localprop.tasks.classification import Classification

IMAGE = Layout("NCHW", 3, 16, 16)
LAYOUTS = {
    "NCHW": (Layout("NCHW", 12, 8, 8), (12, 8, 8)),
    "NHWC": (Layout("NHWC", 12, 8, 8), (8, 8, 12)),
    "NLC+1": (Layout("NLC", 12, 8, 8, 1), (65, 12)),
}
OUTPUT = Layout("NHWC", 24, 4, 4)


def make_loss(
    method,
    index=1,
    count=4,
    input=LAYOUTS["NHWC"][0],
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
    decoder="conv",
    trained_for=None,
    **options,
):
    torch.manual_seed(0)
    spec = ModuleSpec(
        index=index,
        count=count,
        input=input,
        output=OUTPUT,
        source=IMAGE,
        task=trained_for or Classification(),
        prediction=(5,),
        head="mlp",
        decoder=decoder,
        mean=mean,
        std=std,
    )
    return build_loss(method, spec, options)


def features(shape, size=6, seed=0):
    return torch.randn(size, *shape, generator=torch.Generator().manual_seed(seed)) * 2 + 1


LABELS = torch.tensor([0, 1, 2, 1, 0, 0])
PIXELS = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(5))
