"""Files that appear whole or not at all: written aside, synced, renamed."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from localprop.errors import CheckpointError

# safetensors has the error number in its text alone: "(os error 28)", or "Os { code: 28, ..." before 0.5.
_OS_ERROR = re.compile(r"(?:os error|code:) (\d+)")
_REMEDIES = {
    errno.ENOSPC: "free some disk space",
    errno.EDQUOT: "free some disk space of yours, your quota is used up",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder that can be written to",
}


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file, whole or not at all.

    Raises:
        CheckpointError: the disk is full, may not be written or fails.
    """
    with written_aside(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yields a path in a hidden folder beside `path`; the file written there is synced and replaces it."""
    temporary = path.with_name(f".{path.name}.tmp")
    with all_or_nothing(path, temporary):
        temporary.mkdir(parents=True, exist_ok=True)
        yield temporary / path.name
        sync(temporary / path.name)
        os.replace(temporary / path.name, path)
        sync(path.parent)
        shutil.rmtree(temporary)


@contextlib.contextmanager
def all_or_nothing(target: Path, temporary: Path, then: str = "") -> Iterator[None]:
    """Removes `temporary` if what is done inside fails, and says in one line why `target` is not written."""
    try:
        yield
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            code = error.errno
        elif isinstance(error, SafetensorError) and (found := _OS_ERROR.search(str(error))):
            code = int(found[1])
        else:
            raise
        cause = os.strerror(code) if code else str(error)
        remedy = _REMEDIES.get(code or 0, "check the disk and the path")
        raise CheckpointError(f"cannot write {target}: {cause}; {remedy}{then}") from None


def write_synced(path: Path, text: str) -> None:
    """Writes a UTF-8 text file, to the disk itself."""
    path.write_text(text, encoding="utf-8", newline="")
    sync(path)


def sync(path: Path) -> None:
    """Returns when a file or folder is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
