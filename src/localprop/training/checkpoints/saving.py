"""Saves checkpoints: written aside, synced, then renamed, so that each is whole or not there."""

import json
import os
import re
from pathlib import Path
from typing import Any

from localprop.system.files import (
    all_or_nothing,
    make_folder,
    remove_tree,
    sync,
    temporary_name,
    write_synced,
)
from localprop.training.checkpoints.folder import CHECKSUMS, FORMAT, MANIFEST, newest_first, sha256, step_folder
from localprop.training.checkpoints.format import as_json, write_part

# What an interrupted save leaves; version 0.1 had no random part in the name.
_LEFTOVER = re.compile(r"\.step-\d{8,}(\.[0-9a-f]{16})?\.tmp")
_UNTOUCHED = "; earlier checkpoints are untouched, continue with --resume"


def save_checkpoint(folder: Path, step: int, parts: dict[str, Any], meta: dict[str, Any], keep: int) -> Path:
    """Saves a checkpoint of one process: `begin_checkpoint`, `write_parts`, then `publish`.

    Args:
        folder: holds the checkpoints of one run.
        step: optimizer steps done.
        parts: name of a part to its state: dicts with str or int keys, lists and tuples, nested at will, of
            tensors, None, bool, int, float, str, torch.dtype and torch.Size. All comes back bit for bit; tensors
            come back contiguous, and those that share memory as separate ones. A tensor made of others
            (`__tensor_flatten__`) comes back as one if its class is imported by then.
        meta: the same, without tensors.
        keep: checkpoints to keep, this one included.

    Returns:
        The new checkpoint's folder.

    Raises:
        CheckpointError: the disk is full, fails or may not be written, or a state holds something else.
            Nothing is left behind, and earlier checkpoints are untouched.
    """
    aside = begin_checkpoint(folder, step)
    return publish(aside, step, write_parts(aside, step, parts), meta, keep)


def begin_checkpoint(folder: Path, step: int) -> Path:
    """Makes the folder for the parts of a checkpoint that does not count yet; one process calls it.

    Returns:
        The folder, beside the place of the checkpoint. Its name cannot be guessed: the others have to be told.

    Raises:
        CheckpointError: as `save_checkpoint`; or `folder` is a link.
    """
    make_folder(folder)
    aside = temporary_name(step_folder(folder, step))
    with all_or_nothing(step_folder(folder, step), aside, _UNTOUCHED):
        aside.mkdir()
    return aside


def write_parts(aside: Path, step: int, parts: dict[str, Any]) -> dict[str, str]:
    """Writes and syncs parts of a checkpoint that does not count yet; every process writes its own.

    Args:
        aside: what `begin_checkpoint` gave.
        step: optimizer steps done.
        parts: see `save_checkpoint`.

    Returns:
        File names and their SHA-256, for `publish`.

    Raises:
        CheckpointError: as `save_checkpoint`.
    """
    checksums = {}
    with all_or_nothing(step_folder(aside.parent, step), aside, _UNTOUCHED):
        for name, state in parts.items():
            path = aside / f"{name}.safetensors"
            write_part(path, state)
            checksums[path.name] = sha256(path)
    return checksums


def publish(aside: Path, step: int, checksums: dict[str, str], meta: dict[str, Any], keep: int) -> Path:
    """Makes the parts that were written for `step` a checkpoint, then removes what is no longer needed.

    One process calls it once all have written their parts, while the others wait. Besides checkpoints beyond
    `keep` it removes those of later steps: training went on from before them, they are damaged or given up.

    Args:
        aside: what `begin_checkpoint` gave.
        step: optimizer steps done.
        checksums: what `write_parts` returned, of all processes together.
        meta: see `save_checkpoint`.
        keep: checkpoints to keep, this one included.

    Returns:
        The new checkpoint's folder.

    Raises:
        CheckpointError: as `save_checkpoint`.
    """
    folder = aside.parent
    final = step_folder(folder, step)
    with all_or_nothing(final, aside, _UNTOUCHED):
        manifest = {
            "format": FORMAT,
            "step": step,
            "parts": sorted(checksums),
            "meta": as_json(meta, "meta"),
        }
        write_synced(aside / MANIFEST, json.dumps(manifest, indent=1))
        sums = {**checksums, MANIFEST: sha256(aside / MANIFEST)}
        write_synced(aside / CHECKSUMS, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))
        sync(aside)
        if os.path.lexists(final):
            old = final.with_suffix(".old")
            remove_tree(old, folder)
            final.rename(old)
        aside.rename(final)
        sync(folder)
    _prune(folder, final, keep)
    return final


def _prune(folder: Path, newest: Path, keep: int) -> None:
    found = newest_first(folder)
    older = [path for path in found[found.index(newest) + 1 :] if path.suffix != ".old"]
    unneeded = set(found) - {newest, *older[: keep - 1]}
    leftovers = [folder / name for name in os.listdir(folder) if _LEFTOVER.fullmatch(name)]
    for path in [*unneeded, *leftovers]:
        # The new checkpoint is safe: what cannot be removed now is tried again after the next one.
        remove_tree(path, folder)
