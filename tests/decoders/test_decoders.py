"""Every decoder on every layout and ratio: shapes, gradients, learning, positions, memory."""

import pytest
import torch
from torch.nn import functional as F

from localprop.decoders import DECODERS, build_decoder
from localprop.decoders.common import ReduceChannels
from localprop.errors import ConfigError
from localprop.features import Layout

CHANNELS, HEIGHT, WIDTH = 16, 4, 6
LAYOUTS = {
    "NCHW": Layout("NCHW", CHANNELS, HEIGHT, WIDTH),
    "NHWC": Layout("NHWC", CHANNELS, HEIGHT, WIDTH),
    "NLC": Layout("NLC", CHANNELS, HEIGHT, WIDTH),
    "NLC+1": Layout("NLC", CHANNELS, HEIGHT, WIDTH, 1),
    "NLC+5": Layout("NLC", CHANNELS, HEIGHT, WIDTH, 5),
    "nest": Layout("NLC", CHANNELS, HEIGHT, WIDTH),
    "NC": Layout("NC", CHANNELS),
}
RATIOS = [1, 2, 4, 16, 1.5, 0.5]
decoders = pytest.mark.parametrize("name", DECODERS)
# InfoPro's is there to compare with: it upsamples first, aligns corners (which moves positions), and has batch norm.
own_decoders = pytest.mark.parametrize("name", [name for name in DECODERS if name != "infopro"])
layouts = pytest.mark.parametrize("case", LAYOUTS)
ratios = pytest.mark.parametrize("ratio", RATIOS)


def target_of(source, ratio, channels=3):
    return Layout("NCHW", channels, max(1, round(source.height * ratio)), max(1, round(source.width * ratio)))


def as_features(case, grid):
    """Puts a (batch, channels, height, width) grid into the layout of `case`; prefix tokens are random."""
    batch, channels = grid.shape[:2]
    channels_last = grid.permute(0, 2, 3, 1)
    if case == "NCHW":
        return grid
    if case in ("NHWC", "nest"):
        return channels_last.contiguous()
    if case == "NC":
        return grid.reshape(batch, channels)
    prefix = torch.randn(batch, LAYOUTS[case].prefix, channels)
    return torch.cat([prefix, channels_last.flatten(1, 2)], 1)


def random_features(case, batch=2):
    layout = LAYOUTS[case]
    return as_features(case, torch.randn(batch, CHANNELS, layout.height, layout.width))


def fit(decoder, features, target, steps, lr=0.02):
    optimizer = torch.optim.Adam(decoder.parameters(), lr)
    losses = []
    for _ in range(steps):
        loss = F.mse_loss(decoder(features), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@decoders
@layouts
@ratios
def test_gradient_reaches_every_parameter_and_every_position(name, case, ratio):
    torch.manual_seed(0)
    source = LAYOUTS[case]
    target = target_of(source, ratio)
    decoder = build_decoder(name, source, target)
    features = random_features(case).requires_grad_()
    rebuilt = decoder(features)
    assert rebuilt.shape == (2, target.channels, target.height, target.width)
    F.mse_loss(rebuilt, torch.randn_like(rebuilt)).backward()
    for parameter_name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name
    assert (source.grid(features.grad).abs().sum(1) > 0).all()


@decoders
@ratios
@pytest.mark.parametrize("case", ["NHWC", "NLC", "NLC+5", "nest"])
def test_the_layout_does_not_matter_to_what_is_rebuilt(name, ratio, case):
    torch.manual_seed(0)
    target = target_of(LAYOUTS[case], ratio)
    reference, other = (build_decoder(name, LAYOUTS[c], target) for c in ("NCHW", case))
    other.load_state_dict(reference.state_dict())
    grid = torch.randn(2, CHANNELS, HEIGHT, WIDTH)
    torch.testing.assert_close(other(as_features(case, grid)), reference(grid), rtol=1e-4, atol=1e-5)


@decoders
@ratios
def test_a_decoder_learns_a_random_target(name, ratio):
    torch.manual_seed(0)
    source = LAYOUTS["NLC+1"]
    target = target_of(source, ratio)
    decoder = build_decoder(name, source, target)
    # One value per position that both grids can tell: no decoder could fit noise finer than its source.
    noise = torch.randn(2, target.channels, *decoder.size)
    wanted = F.interpolate(noise, decoder.target_size, mode="bilinear")
    losses = fit(decoder, random_features("NLC+1"), wanted, steps=20)
    assert losses[-1] < 0.6 * losses[0]


@decoders
@pytest.mark.parametrize("ratio", [1, 2, 4, 1.5, 0.5])
def test_a_bright_quadrant_is_rebuilt_where_it_is(name, ratio):
    torch.manual_seed(0)
    case = "NLC+5"
    source = LAYOUTS[case]
    target = target_of(source, ratio, channels=1)
    decoder = build_decoder(name, source, target)
    dark, bright = torch.randn(2, CHANNELS, 1, 1)

    def example(mask):
        grid = torch.where(mask, bright, dark) + 0.1 * torch.randn(len(mask), CHANNELS, HEIGHT, WIDTH)
        # Blocks of 2 x 3 positions, so that a target of half the size shows them as well.
        return as_features(case, grid), F.interpolate(mask.float(), decoder.target_size, mode="area")

    coarse = torch.rand(8, 1, 2, 2) < 0.5
    fit(decoder, *example(coarse.repeat_interleave(2, 2).repeat_interleave(3, 3)), steps=40)
    quadrants = torch.eye(4, dtype=torch.bool).reshape(4, 1, 2, 2)
    features, _ = example(quadrants.repeat_interleave(2, 2).repeat_interleave(3, 3))
    with torch.no_grad():
        found = F.adaptive_avg_pool2d(decoder(features), 2).flatten(1)
    others = found.masked_fill(torch.eye(4, dtype=torch.bool), -1).amax(1)
    assert (found.diagonal() > others + 0.15).all(), found


@own_decoders
def test_pixels_of_a_token_stay_together(name):
    """The target's patch of one position depends on that position and near ones, and most on itself."""
    torch.manual_seed(0)
    source = Layout("NHWC", CHANNELS, 40, 24)
    target = Layout("NCHW", 3, 160, 96)
    decoder = build_decoder(name, source, target)
    features = torch.randn(1, 40, 24, CHANNELS)
    changed = features.clone()
    changed[0, 31, 5] += 1
    with torch.no_grad():
        difference = (decoder(changed) - decoder(features)).abs().sum((0, 1))
    share = difference.reshape(40, 4, 24, 4).sum((1, 3))
    assert share.argmax() == 31 * 24 + 5
    assert share[:16].sum() == 0  # no decoder reaches beyond a window of 16 x 16
    assert share[31, 5] > 0.1 * share.sum()


@decoders
def test_the_same_seed_gives_the_same_decoder(name):
    source, features, rebuilt = LAYOUTS["NHWC"], random_features("NHWC"), []
    for _ in range(2):
        torch.manual_seed(7)
        rebuilt.append(build_decoder(name, source, target_of(source, 1.5)).train()(features))
    assert torch.equal(*rebuilt)


def saved_maps(decoder, features):
    """What forward keeps for backward, one tensor per storage; the features and the decoder's own left out."""
    known = {t.untyped_storage().data_ptr() for t in [features, *decoder.parameters(), *decoder.buffers()]}
    saved = {}

    def pack(tensor):
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in known:
            saved[pointer] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rebuilt = decoder(features)
    rebuilt.sum()  # keeps the graph, and so the storages, until here
    return list(saved.values())


SWIN_TINY = [
    (Layout("NHWC", 96, 56, 56), Layout("NCHW", 3, 224, 224)),
    (Layout("NHWC", 192, 28, 28), Layout("NHWC", 96, 56, 56)),
    (Layout("NHWC", 768, 7, 7), Layout("NHWC", 384, 14, 14)),
    (Layout("NHWC", 384, 14, 14), Layout("NHWC", 384, 14, 14)),
]


@own_decoders
@pytest.mark.parametrize(("source", "target"), SWIN_TINY)
def test_what_is_kept_for_backward_is_bounded(name, source, target):
    decoder = build_decoder(name, source, target).float()
    features = torch.randn(1, source.height, source.width, source.channels, requires_grad=True)
    saved = saved_maps(decoder, features)
    budget = features.nbytes + 4 * target.channels * target.height * target.width
    allowed = {"conv": 1.05, "deconv": 0.55, "pixel-shuffle": 0.7, "transformer": 2.8}[name]
    assert sum(tensor.untyped_storage().nbytes() for tensor in saved) < allowed * budget
    # At the target's resolution nothing is wider than the target, or than the few channels an image needs.
    upsampled = target.height * target.width * max(target.channels, 8)
    assert max(tensor.numel() for tensor in saved) <= max(upsampled, features.numel())


@own_decoders
def test_autocast_reaches_the_norm_of_the_reduction(name):
    source = Layout("NHWC", 64, 8, 8)
    decoder = build_decoder(name, source, Layout("NCHW", 3, 16, 16))
    reductions = [module for module in decoder.modules() if isinstance(module, ReduceChannels)]
    assert len(reductions) == 1
    with torch.autocast("cpu", torch.bfloat16):
        reduced = reductions[0](torch.randn(2, 64, 8, 8))
        rebuilt = decoder(torch.randn(2, 8, 8, 64))
    assert reduced.dtype == rebuilt.dtype == torch.bfloat16


def test_an_unknown_decoder_gets_a_suggestion():
    with pytest.raises(ConfigError, match="no decoder is called 'pixelshuffle'; did you mean 'pixel-shuffle'"):
        build_decoder("pixelshuffle", LAYOUTS["NCHW"], LAYOUTS["NCHW"])
