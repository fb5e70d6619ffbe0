"""Random crops and flips, and resizing, of whole batches on their device."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from localprop.data.transfer import on_device


def random_crop(images: Tensor, pad: int, generator: torch.Generator) -> Tensor:
    """Pads with black and cuts a window of the old size, at another place in each image.

    Args:
        images: (batch, channels, height, width), of a type that NumPy has.
        pad: pixels added on each side.
        generator: on the CPU, whatever the device of `images`.
    """
    if pad == 0:
        return images
    batch, _, height, width = images.shape
    corners = torch.randint(2 * pad + 1, (2, batch), generator=generator)
    padded = F.pad(images, (pad, pad, pad, pad))
    # Every window as a view; indexing copies one of them per image.
    if images.device.type == "cpu":
        # NumPy copies row by row what torch copies value by value.
        views = sliding_window_view(padded.numpy(), (height, width), axis=(2, 3))
        return torch.from_numpy(views[np.arange(batch), :, corners[0].numpy(), corners[1].numpy()])
    top, left = on_device(corners, images.device)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(batch, device=images.device), :, top, left]


def random_hflip(images: Tensor, chance: float, generator: torch.Generator) -> Tensor:
    """Mirrors each image of (batch, channels, height, width) left to right with the given `chance`."""
    if chance == 0:
        return images
    batch = len(images)
    flipped = torch.rand(batch, generator=generator) < chance
    # Choosing whole images copies memory in blocks; torch.where would go pixel by pixel.
    chosen = torch.arange(batch) + batch * flipped
    return torch.cat([images, images.flip(3)]).index_select(0, on_device(chosen, images.device))


def resize(images: Tensor, side: int) -> Tensor:
    """Resizes (batch, channels, height, width) bilinearly to `side` x `side`; float32 where it has to."""
    if images.shape[-2:] == (side, side):
        return images
    shrinks = side < max(images.shape[-2:])
    return F.interpolate(images.float(), (side, side), mode="bilinear", antialias=shrinks)
