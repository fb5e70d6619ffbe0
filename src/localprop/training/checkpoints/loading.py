"""Loads checkpoints: each is checked by its SHA-256 first, and the newest valid one is taken."""

import errno
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from localprop.errors import CheckpointError
from localprop.system.nested import join
from localprop.system.reading import COUNT, MAPPING, TEXT, Malformed, check, parse_json, read_text, require_once
from localprop.training.checkpoints.folder import CHECKSUMS, FORMAT, MANIFEST, NAME, checkpoint_names, sha256
from localprop.training.checkpoints.format import read_part

_PART = re.compile(r"[\w-][\w.-]*\.safetensors")


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
    number = NAME.fullmatch(path.name)
    if number and int(number[1]) != manifest["step"]:
        raise Malformed(f"{MANIFEST} is of step {manifest['step']}")
    return manifest


def _verify(path: Path, sums: dict[str, str]) -> None:
    if path.name not in sums:
        place, flaw = path.parent / CHECKSUMS, f"it has no line for {path.name}"
    elif sha256(path) != sums[path.name]:
        place, flaw = path, f"its SHA-256 is not the one in {CHECKSUMS}"
    else:
        return
    raise CheckpointError(f"{place} is damaged, {flaw}; resume from another checkpoint")
