"""Files that appear whole or not at all: written aside, synced, renamed. Nothing is written or removed through a link.

A run folder may come from a stranger, who can put links into it under any name that can be guessed.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import time
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
    errno.ENOENT: "its folder is not there; put it back, or write to another place",
}
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
_FORGOTTEN_SECONDS = 3600  # no file takes so long to write: whoever began it was killed


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file, whole or not at all.

    Raises:
        CheckpointError: the disk is full, may not be written or fails.
    """
    with written_aside(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yields a path in a hidden folder beside `path`; the file written there is synced and replaces it.

    A link called `path` is replaced, not followed. The folder that holds `path` has to be there.

    Raises:
        CheckpointError: the disk is full, may not be written or fails.
    """
    temporary = temporary_name(path)
    with all_or_nothing(path, temporary):
        temporary.mkdir(0o700)
        yield temporary / path.name
        sync(temporary / path.name)
        os.replace(temporary / path.name, path)
        sync(path.parent)
    shutil.rmtree(temporary, ignore_errors=True)  # the file is in its place: what stays is removed another time
    _remove_forgotten(path)


@contextlib.contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """Yields a new hidden folder beside `path`, which takes its place at the end; an empty folder may be there.

    What holds `path` is made too, if it is not there.

    Raises:
        CheckpointError: `path` is a link or holds files; or the disk is full, may not be written or fails.
    """
    temporary = temporary_name(path)
    with all_or_nothing(path, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            sync(file)
        sync(temporary)
        os.rename(temporary, path)
        sync(path.parent)


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path` that nobody can guess, so that nothing can be there: make the folder exclusively."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def refuse_link(path: Path) -> None:
    """Raises a CheckpointError where a folder that will be written into is a link."""
    if path.is_symlink():
        raise CheckpointError(f"{path} is a link, and nothing is written through it; remove the link")


def make_folder(path: Path) -> None:
    """Makes a folder inside a run folder, if it is not there. It is not made through a link, nor is what holds it.

    Raises:
        CheckpointError: it is a link, or cannot be made.
    """
    refuse_link(path)
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise _cannot_write(path, error.errno, str(error)) from None


def remove_tree(path: Path, root: Path) -> None:
    """Removes a file, or a folder with all that is in it. Of a link only the link is removed.

    What cannot be removed, because the disk fails or may not be written, stays.

    Raises:
        CheckpointError: it is not inside the folder `root` once all links on the way to it are followed.
    """
    place = path.parent.resolve() / path.name
    if path.name in ("", "..") or root.resolve() not in place.parents:
        raise CheckpointError(f"{path} is not removed, because it is not inside {root}; check the links there")
    with contextlib.suppress(OSError):
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Removes the unfinished files of killed processes in a folder, into which nobody may be writing now."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if _TEMPORARY.fullmatch(name):
                remove_tree(folder / name, folder)


def _remove_forgotten(path: Path) -> None:
    """Removes unfinished files of earlier attempts to write `path`; others may be writing it now."""
    remove_tree(path.with_name(f".{path.name}.tmp"), path.parent)  # as version 0.1 called it
    start = f".{path.name}."
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            ours = entry.name.startswith(start) and _TEMPORARY.fullmatch(entry.name)
            if ours and time.time() - entry.stat(follow_symlinks=False).st_mtime > _FORGOTTEN_SECONDS:
                remove_tree(path.with_name(entry.name), path.parent)


def open_to_write(path: Path, *flags: int) -> int:
    """Opens a file that stays where it is, such as a log or a lock, and makes it if it is not there; never a link.

    Args:
        path: the file.
        flags: such as os.O_APPEND; nothing is cut off.

    Returns:
        A file descriptor, to read and to write.

    Raises:
        CheckpointError: it is a link or no regular file, or cannot be opened.
    """
    mode = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    for flag in flags:
        mode |= flag
    try:
        descriptor = os.open(path, mode, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CheckpointError(f"{path} is a link, and nothing is written through it; remove the link") from None
        raise _cannot_write(path, error.errno, str(error)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path} is no regular file; remove it")
    return descriptor


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
        raise _cannot_write(target, code, str(error), then) from None


def _cannot_write(target: Path, code: int | None, text: str, then: str = "") -> CheckpointError:
    cause = os.strerror(code) if code else text
    remedy = _REMEDIES.get(code or 0, "check the disk and the path")
    return CheckpointError(f"cannot write {target}: {cause}; {remedy}{then}")


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
