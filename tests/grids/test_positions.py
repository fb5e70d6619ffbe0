"""Random positions of a grid: which they are, what lies there, and where gradients go."""

import pytest
import torch

from localprop.decoders import build_decoder
from localprop.features import Layout
from localprop.grids.positions import random_positions, select


def test_positions_are_different_ones_and_equally_likely():
    torch.manual_seed(0)
    positions = random_positions(4000, 12, 3, torch.device("cpu"))
    assert positions.shape == (4000, 3)
    assert all(len(set(row)) == 3 for row in positions.tolist())
    assert positions.flatten().bincount(minlength=12) == pytest.approx([1000] * 12, rel=0.15)


def test_positions_follow_the_seed():
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(random_positions(2, 64, 16, torch.device("cpu")))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("patch", [1, 2, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_patches_and_their_gradients(patch, channels_last):
    torch.manual_seed(0)
    grid = torch.randn(2, 5, 3 * patch, 4 * patch, dtype=torch.float64)
    grid = (grid.contiguous(memory_format=torch.channels_last) if channels_last else grid).requires_grad_()
    positions = random_positions(2, 12, 5, grid.device)
    selected = select(grid, positions, patch)
    assert selected.shape == (2, 5, 5 * patch, patch)
    for image, own in enumerate(positions.tolist()):
        for number, position in enumerate(own):
            row, column = (place * patch for place in divmod(position, 4))
            expected = grid[image, :, row : row + patch, column : column + patch]
            assert torch.equal(selected[image, :, number * patch : (number + 1) * patch], expected)
    assert torch.autograd.gradcheck(lambda grid: select(grid, positions, patch), grid)


SIZES = [((4, 6), (4, 6)), ((4, 6), (16, 24)), ((8, 6), (4, 3))]


@pytest.mark.parametrize("kind", ["NCHW", "NHWC", "NLC"])
@pytest.mark.parametrize(("size", "target_size"), SIZES)
def test_patches_are_those_of_the_whole_grid(kind, size, target_size):
    torch.manual_seed(0)
    source, target = Layout(kind, 16, *size, 2 if kind == "NLC" else 0), Layout("NCHW", 3, *target_size)
    decoder = build_decoder("pixel-shuffle", source, target).double()
    shape = {"NCHW": (16, *size), "NHWC": (*size, 16), "NLC": (2 + size[0] * size[1], 16)}[kind]
    features = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)
    positions = random_positions(2, decoder.size[0] * decoder.size[1], 4, features.device)
    whole = select(decoder(features), positions, decoder.patch)
    patches = decoder(features, positions)
    torch.testing.assert_close(patches, whole)
    weight = torch.randn_like(whole)
    expected = torch.autograd.grad((whole * weight).sum(), [features, *decoder.parameters()])
    given = torch.autograd.grad((patches * weight).sum(), [features, *decoder.parameters()])
    torch.testing.assert_close(given, expected)


@pytest.mark.parametrize(
    ("size", "target_size", "patch"),
    [
        ((4, 6), (8, 12), 2),
        ((4, 4), (6, 6), None),
        ((4, 4), (8, 16), None),
        ((8, 8), (4, 4), 1),
        ((1, 1), (64, 64), None),
    ],
)
def test_a_patch_belongs_to_a_position_where_the_target_divides(size, target_size, patch):
    decoder = build_decoder("pixel-shuffle", Layout("NCHW", 16, *size), Layout("NCHW", 3, *target_size))
    assert decoder.patch == patch
