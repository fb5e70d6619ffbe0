"""Layouts against plain numpy indexing, and their inference from shapes of known models."""

import numpy as np
import pytest
import torch

from localprop.errors import ChainError
from localprop.features import Layout, image_layout, infer_layout

SQUARE = (3, 224, 224)
WIDE = (3, 128, 256)


@pytest.mark.parametrize(
    ("shape", "image", "prefix", "hint", "expected"),
    [
        pytest.param((2, 64, 56, 56), SQUARE, None, None, Layout("NCHW", 64, 56, 56), id="resnet"),
        pytest.param((2, 56, 56, 96), SQUARE, None, None, Layout("NHWC", 96, 56, 56), id="swin"),
        pytest.param((2, 512, 1, 1), SQUARE, None, None, Layout("NCHW", 512, 1, 1), id="1x1 NCHW"),
        pytest.param((2, 1, 1, 512), SQUARE, None, None, Layout("NHWC", 512, 1, 1), id="1x1 NHWC"),
        pytest.param((2, 196, 768), SQUARE, 0, None, Layout("NLC", 768, 14, 14), id="no class token"),
        pytest.param((2, 197, 768), SQUARE, 1, None, Layout("NLC", 768, 14, 14, 1), id="class token"),
        pytest.param((2, 197, 768), SQUARE, None, None, Layout("NLC", 768, 14, 14, 1), id="class token unsaid"),
        pytest.param((2, 198, 768), SQUARE, 2, None, Layout("NLC", 768, 14, 14, 2), id="deit distilled"),
        pytest.param((2, 261, 768), SQUARE, 5, None, Layout("NLC", 768, 16, 16, 5), id="registers"),
        pytest.param((2, 196, 768), SQUARE, 1, None, Layout("NLC", 768, 14, 14), id="class token not yet there"),
        pytest.param((2, 1, 768), SQUARE, 1, None, Layout("NLC", 768, 1, 1), id="class token alone"),
        pytest.param((2, 16, 196, 128), SQUARE, None, None, Layout("NLC", 128, 56, 56), id="nest"),
        pytest.param((2, 1000), SQUARE, None, None, Layout("NC", 1000), id="vector"),
        pytest.param((2, 96, 32, 64), WIDE, None, None, Layout("NCHW", 96, 32, 64), id="wide NCHW"),
        pytest.param((2, 32, 64, 96), WIDE, None, None, Layout("NHWC", 96, 32, 64), id="wide NHWC"),
        pytest.param((2, 128, 192), WIDE, 0, None, Layout("NLC", 192, 8, 16), id="wide NLC"),
        pytest.param((2, 129, 192), WIDE, 1, None, Layout("NLC", 192, 8, 16, 1), id="wide class token"),
        pytest.param((2, 2, 192), (3, 16, 32), 1, None, Layout("NLC", 192, 1, 2), id="exact before rounded"),
        pytest.param((2, 28, 384), (3, 224, 112), 0, None, Layout("NLC", 384, 7, 4), id="rounded up"),
        pytest.param((2, 8, 8, 8), (3, 32, 32), None, None, Layout("NCHW", 8, 8, 8), id="ambiguous"),
        pytest.param((2, 8, 8, 8), (3, 32, 32), None, "NHWC", Layout("NHWC", 8, 8, 8), id="ambiguous, told"),
        pytest.param((2, 4, 4, 9), (3, 32, 32), None, "NCHW", Layout("NHWC", 9, 4, 4), id="told wrongly"),
        pytest.param(
            (2, 2, 24, 296),
            (3, 16, 192),
            None,
            None,
            Layout("NHWC", 296, 2, 24),
            id="exact before rounded, 4-D",
        ),
        pytest.param((2, 13, 64), SQUARE, 0, None, Layout("NLC", 64, 3, 3, 4), id="smallest prefix"),
        pytest.param((2, 3, 3, 64), (3, 10, 14), None, None, Layout("NHWC", 64, 3, 3), id="rounded aspect"),
    ],
)
def test_layout_is_inferred_from_the_shape(shape, image, prefix, hint, expected):
    assert infer_layout(shape, image, prefix, hint) == expected


@pytest.mark.parametrize("image", [(3, 64, 64), (3, 64, 128), (3, 192, 64), (3, 96, 128)])
@pytest.mark.parametrize("patch", [4, 8, 16])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_a_told_prefix_leaves_the_grid_of_patches(image, patch, prefix):
    height, width = image[1] // patch, image[2] // patch
    layout = infer_layout((2, prefix + height * width, 48), image, prefix)
    assert layout == Layout("NLC", 48, height, width, prefix)


def test_tokens_without_a_grid_of_the_images_aspect_are_one_row():
    assert infer_layout((2, 23, 64), (3, 10, 1000)) == Layout("NLC", 64, 1, 23)


@pytest.mark.parametrize("shape", [(), (8,)])
def test_a_shape_without_channels_is_an_error(shape):
    with pytest.raises(ChainError, match="no channel axis"):
        infer_layout(shape, SQUARE)


def test_an_image_batch_is_nchw():
    assert image_layout((3, 20, 30)) == Layout("NCHW", 3, 20, 30)


@pytest.fixture
def grid():
    """Values that tell image, channel, row and column: (2, 5, 3, 4)."""
    return np.random.default_rng(0).standard_normal((2, 5, 3, 4)).astype(np.float32)


def views(layout, features):
    features = torch.from_numpy(np.ascontiguousarray(features))
    shared = [layout.grid(features), layout.tokens(features)]
    assert all(view.untyped_storage().data_ptr() == features.untyped_storage().data_ptr() for view in shared)
    return [tensor.numpy() for tensor in (*shared, layout.pooled(features))]


@pytest.mark.parametrize("kind", ["NCHW", "NHWC", "NLC", "nest"])
def test_views_show_the_same_positions_in_every_layout(grid, kind):
    channels_last = grid.transpose(0, 2, 3, 1)
    features = {"NCHW": grid, "NLC": channels_last.reshape(2, 12, 5)}.get(kind, channels_last)
    layout = Layout("NLC" if kind == "nest" else kind, 5, 3, 4)
    as_grid, as_tokens, pooled = views(layout, features)
    np.testing.assert_array_equal(as_grid, grid)
    for row, column in np.ndindex(3, 4):
        np.testing.assert_array_equal(as_tokens[:, 4 * row + column], grid[:, :, row, column])
    np.testing.assert_allclose(pooled, grid.mean((2, 3)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prefix", [1, 5])
def test_prefix_tokens_are_off_the_grid_and_half_of_the_pooled_vector(grid, prefix):
    extra = np.random.default_rng(1).standard_normal((2, prefix, 5)).astype(np.float32)
    features = np.concatenate([extra, grid.transpose(0, 2, 3, 1).reshape(2, 12, 5)], 1)
    as_grid, as_tokens, pooled = views(Layout("NLC", 5, 3, 4, prefix), features)
    np.testing.assert_array_equal(as_grid, grid)
    np.testing.assert_array_equal(as_tokens[:, :prefix], extra)
    np.testing.assert_allclose(pooled, (grid.mean((2, 3)) + extra.mean(1)) / 2, rtol=1e-5, atol=1e-6)


def test_a_vector_is_a_grid_of_one_position():
    vector = np.random.default_rng(2).standard_normal((2, 5)).astype(np.float32)
    as_grid, as_tokens, pooled = views(Layout("NC", 5), vector)
    assert as_grid.shape == (2, 5, 1, 1)
    assert as_tokens.shape == (2, 1, 5)
    np.testing.assert_array_equal(pooled, vector)
