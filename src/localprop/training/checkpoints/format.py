"""The file of a part of a checkpoint, and that of weights: safetensors, never a pickle.

The header of a part holds everything but its tensors as JSON. The same state gives the same bytes, whichever process
wrote them.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from localprop.errors import CheckpointError
from localprop.system.files import sync, written_aside
from localprop.system.nested import KINDS, Unknown, join, split
from localprop.system.reading import TEXT, Malformed, check, parse_json


def write_part(path: Path, state: Any) -> None:
    """Writes and syncs a part; see `save_checkpoint` for what its state may hold.

    Raises:
        CheckpointError: it holds something else.
        OSError: the disk is full, fails or may not be written.
    """
    tensors: dict[str, Tensor] = {}
    structure = as_json(state, path.stem, tensors)
    _write_tensors(path, tensors, {"structure": json.dumps(structure)})
    sync(path)


def read_part(path: Path, device: str | torch.device) -> Any:
    """Reads what `write_part` wrote.

    Args:
        path: the file.
        device: where the tensors go.

    Raises:
        Malformed: it is damaged.
    """
    try:
        return _read_tensors(path, device)
    except (Malformed, SafetensorError) as error:
        raise Malformed(f"{path.name}: {error}") from None


def _read_tensors(path: Path, device: str | torch.device) -> Any:
    with safe_open(path, framework="pt") as file:
        # The copy frees memory from the file, which may be removed, and aligns it as torch does: misaligned
        # tensors may take other kernels than before the interruption, with other rounding.
        tensors = {name: file.get_tensor(name).to(device, copy=True) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
        check(metadata, {"structure": TEXT}, "header")
        return join(parse_json(metadata["structure"]), tensors)


def as_json(value: Any, place: str, tensors: dict[str, Tensor] | None = None) -> Any:
    """A nested value as JSON, with its tensors taken out.

    Args:
        value: the value.
        place: what it is called in a message.
        tensors: where its tensors go; None where it may have none.

    Raises:
        CheckpointError: it holds something that a checkpoint cannot.
    """
    try:
        return split(value, place, tensors)
    except Unknown as error:
        raise CheckpointError(f"cannot save the {error}; a checkpoint takes tensors (not in meta), {KINDS}") from None


def save_weights(path: Path, state_dict: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Saves a plain state dict that timm reads, as one safetensors file, whole or not at all.

    Tensors that share memory (tied weights) are written under each of their names, so that
    `load_state_dict(strict=True)` finds all of them.

    Raises:
        CheckpointError: the disk is full, may not be written or fails.
    """
    with written_aside(path) as temporary:
        _write_tensors(temporary, state_dict, metadata or {})


def _write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file whose bytes depend on nothing but what is written."""
    dense, memory = {}, set()
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_complex():
            raise CheckpointError(f"cannot save the {tensor.type()} at {name}; make it dense and real")
        dense[name] = tensor.detach().cpu().contiguous()
        address = dense[name].untyped_storage().data_ptr()
        if address in memory:  # safetensors refuses tensors that share memory
            dense[name] = dense[name].clone()
        memory.add(address)
    path.touch()
    mode = path.stat().st_mode
    save_file(dense, path, metadata)
    path.chmod(mode)  # safetensors creates its files for the owner alone
    if len(metadata) > 1:
        _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Sorts the metadata in a safetensors header, which the library writes in random order."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(size))
