"""Checkpoints on disk: written aside, synced, renamed, checked by SHA-256.

A checkpoint is a folder of parts, so that every process of a parallel run can write its own:

    step-00001234/
      module-0.safetensors ...   a part: its tensors, and in the header everything else of it as JSON
      manifest.json              step, names of the parts, meta
      SHA256SUMS                 of all of these; `sha256sum --check SHA256SUMS` verifies them too
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from localprop.errors import CheckpointError
from localprop.system.files import (
    all_or_nothing,
    make_folder,
    remove_tree,
    sync,
    temporary_name,
    write_synced,
)
from localprop.system.nested import join
from localprop.system.reading import (
    COUNT,
    MAPPING,
    TEXT,
    Malformed,
    check,
    parse_json,
    read_text,
    require_once,
    require_regular,
)
from localprop.training.checkpoints.format import as_json, read_part, write_part

MANIFEST = "manifest.json"
CHECKSUMS = "SHA256SUMS"
FORMAT = 2
# "step-00001234.old" exists only while a checkpoint of the same step takes its place.
_NAME = re.compile(r"step-(\d{8,})(\.old)?")
_PART = re.compile(r"[\w-][\w.-]*\.safetensors")
# What an interrupted save leaves; version 0.1 had no random part in the name.
_LEFTOVER = re.compile(r"\.step-\d{8,}(\.[0-9a-f]{16})?\.tmp")
_UNTOUCHED = "; earlier checkpoints are untouched, continue with --resume"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and found whole.

    Args:
        step: optimizer steps done.
        meta: what was saved as `meta`.
        parts: what was saved as `parts`, sorted by name.
        path: its folder.
    """

    step: int
    meta: dict[str, Any]
    parts: dict[str, Any]
    path: Path


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
    aside = temporary_name(_final(folder, step))
    with all_or_nothing(_final(folder, step), aside, _UNTOUCHED):
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
    with all_or_nothing(_final(aside.parent, step), aside, _UNTOUCHED):
        for name, state in parts.items():
            path = aside / f"{name}.safetensors"
            write_part(path, state)
            checksums[path.name] = _sha256(path)
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
    final = _final(folder, step)
    with all_or_nothing(final, aside, _UNTOUCHED):
        manifest = {
            "format": FORMAT,
            "step": step,
            "parts": sorted(checksums),
            "meta": as_json(meta, "meta"),
        }
        write_synced(aside / MANIFEST, json.dumps(manifest, indent=1))
        sums = {**checksums, MANIFEST: _sha256(aside / MANIFEST)}
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


def load_checkpoint(
    path: Path,
    device: str | torch.device = "cpu",
    only: Collection[str] | None = None,
    flaw: Callable[[dict[str, Any]], str | None] | None = None,
) -> Checkpoint:
    """Verifies a checkpoint and reads it.

    Args:
        path: the checkpoint's folder.
        device: where the tensors go.
        only: names of the parts to verify and read (default: all).
        flaw: says of a part, given by its name, what is wrong with it; None if nothing is.

    Raises:
        CheckpointError: a file is missing or damaged, or a part has a flaw; the line names it.
    """
    try:
        lines = read_text(path / CHECKSUMS).split("\n")
        sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        _verify(path / MANIFEST, sums)
        manifest = _read_manifest(path)
        files = [path / name for name in manifest["parts"]]
        files = [file for file in files if only is None or file.stem in only]
        for file in files:
            _verify(file, sums)
        parts = {file.stem: read_part(file, device) for file in files}
        if flaw and (reason := flaw(parts)):
            raise CheckpointError(f"{path}: {reason}; resume from another checkpoint")
        meta = join(manifest["meta"], {})
    except Malformed as error:
        raise CheckpointError(f"{path} is damaged: {error}; resume from another checkpoint") from None
    except CheckpointError as error:
        raise error if str(path) in str(error) else CheckpointError(f"{path}: {error}") from None
    except OSError as error:
        cause = "is missing" if error.errno == errno.ENOENT else f"cannot be read ({error.strerror})"
        raise CheckpointError(f"{error.filename or path} {cause}; resume from another checkpoint") from None
    return Checkpoint(manifest["step"], meta, parts, path)


def newest_checkpoint(
    folder: Path,
    device: str | torch.device = "cpu",
    only: Collection[str] | None = None,
    flaw: Callable[[dict[str, Any]], str | None] | None = None,
    accept: Callable[[Checkpoint], str | None] | None = None,
    agree: Callable[[str | None], str | None] = lambda reason: reason,
    names: Sequence[str] | None = None,
) -> tuple[Checkpoint | None, list[str]]:
    """Reads the newest valid checkpoint of `folder`.

    Several processes that read their parts of it call this together, and all take the same one.

    Args:
        folder: holds the checkpoints of one run.
        device: see `load_checkpoint`, as for the next two.
        only: names of parts.
        flaw: says of a part what is wrong with it.
        accept: takes a checkpoint over, or says why it cannot be.
        agree: given why this process cannot take a checkpoint, or None, says why any process cannot.
        names: of the checkpoints to try, in this order (default: all, the newest first).

    Returns:
        It, or None, and for each newer one that was passed over a line that says why.
    """
    passed_over: list[str] = []
    for name in checkpoint_names(folder) if names is None else names:
        try:
            checkpoint, reason = load_checkpoint(folder / name, device, only, flaw), None
        except CheckpointError as error:
            checkpoint, reason = None, str(error)
        reason = agree(reason)
        if checkpoint and not reason and accept:
            reason = accept(checkpoint)
            reason = agree(reason and f"{folder / name}: {reason}")
        if checkpoint and not reason:
            return checkpoint, passed_over
        passed_over.append(str(reason))
    return None, passed_over


def checkpoint_names(folder: Path) -> list[str]:
    """Names of the checkpoints in `folder`, valid or not, the newest first."""
    return [path.name for path in _newest_first(folder)]


def has_checkpoint(folder: Path) -> bool:
    """Whether there is any checkpoint in `folder`, valid or not: without reading them."""
    return bool(_newest_first(folder))


def _final(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _newest_first(folder: Path) -> list[Path]:
    """The checkpoints of `folder`, valid or not; of one step, the one being replaced comes second."""
    matches = [match for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    matches.sort(key=lambda match: (int(match[1]), match[2] is None), reverse=True)
    return [folder / match[0] for match in matches]


def _prune(folder: Path, newest: Path, keep: int) -> None:
    found = _newest_first(folder)
    older = [path for path in found[found.index(newest) + 1 :] if path.suffix != ".old"]
    unneeded = set(found) - {newest, *older[: keep - 1]}
    leftovers = [folder / name for name in os.listdir(folder) if _LEFTOVER.fullmatch(name)]
    for path in [*unneeded, *leftovers]:
        # The new checkpoint is safe: what cannot be removed now is tried again after the next one.
        remove_tree(path, folder)


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = parse_json(read_text(path / MANIFEST))
    check(manifest, {"format": COUNT}, MANIFEST)
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{path} is of another version of localprop; resume it with that version")
    check(manifest, {"step": COUNT, "parts": [TEXT], "meta": MAPPING}, MANIFEST)
    require_once(manifest["parts"], f"{MANIFEST}: ")
    for name in manifest["parts"]:
        if not _PART.fullmatch(name):
            raise Malformed(f"{MANIFEST} has a part called {name[:40]!r}, which is no file of a checkpoint")
    number = _NAME.fullmatch(path.name)
    if number and int(number[1]) != manifest["step"]:
        raise Malformed(f"{MANIFEST} is of step {manifest['step']}")
    return manifest


def _sha256(path: Path) -> str:
    require_regular(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _verify(path: Path, sums: dict[str, str]) -> None:
    if path.name not in sums:
        place, flaw = path.parent / CHECKSUMS, f"it has no line for {path.name}"
    elif _sha256(path) != sums[path.name]:
        place, flaw = path, f"its SHA-256 is not the one in {CHECKSUMS}"
    else:
        return
    raise CheckpointError(f"{place} is damaged, {flaw}; resume from another checkpoint")
