"""States to save, and their exact content, for the tests of checkpoints."""

import struct
from pathlib import Path

import torch

from localprop.training.checkpoints.saving import save_checkpoint


def bits(value):
    """The exact content of a nested value: types, key order, and every bit of floats and tensors."""
    if isinstance(value, torch.Tensor):
        # numpy has no bfloat16, and NaN differs from itself: compare bytes.
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return (value.dtype, tuple(value.shape), data)
    if isinstance(value, dict):
        return ("dict", [(type(key), key, bits(item)) for key, item in value.items()])
    if isinstance(value, (list, tuple)):
        return (type(value), [bits(item) for item in value])
    if isinstance(value, float):
        return (float, "nan" if value != value else struct.pack("d", value))
    return (type(value), value)


def state_at(step: int) -> dict:
    return {
        "module-0": {"units": torch.full((50,), step), "step": step},
        "module-1": [torch.full((9,), -step)],
    }


def save(folder: Path, *steps: int, keep: int = 9) -> Path:
    for step in steps:
        path = save_checkpoint(folder, step, state_at(step), {"epoch": step // 10}, keep)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    file.write_bytes(content)
