"""A run folder is new, or one process at a time writes into it."""

import contextlib
import errno
import fcntl
import os
from pathlib import Path

from localprop.errors import CheckpointError, ConfigError
from localprop.system.commands import resume_command
from localprop.system.files import open_to_write

LOCK = ".lock"
# Some file systems of clusters have no locks at all.
_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


def require_new_folder(output: Path, name: str | None) -> None:
    """Raises a ConfigError where a run folder has been named and there is something in it already.

    Args:
        output: holds run folders.
        name: of the folder in it; None for one that is not there yet.
    """
    folder = output / name if name else None
    # A run that died at once leaves its lock alone.
    if folder and folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= {LOCK}):
        raise ConfigError(
            f"{folder} exists already; choose another --experiment, or resume it: {resume_command(folder)}"
        )


class FolderLock:
    """Locks a folder for this process until it is released, or the process ends. A context manager.

    The lock belongs to the process alone: one that this process forks does not hold it.

    Args:
        folder: it exists.

    Attributes:
        note: a line for the user where the file system has no locks; else "".

    Raises:
        CheckpointError: another process holds the folder, or it cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.note = folder, ""
        self._path = folder / LOCK
        self._acquire()
        while not self._is_there():  # removed by the process that held it, between two lines here
            os.close(self._file)
            self._acquire()

    def require(self) -> None:
        """Checks that the folder is still the one that was locked.

        Raises:
            CheckpointError: it was removed, or replaced by another.
        """
        if not self._is_there():
            raise CheckpointError(
                f"{self.folder} was removed or replaced while the run was writing into it; nothing more is saved, "
                "start a new run"
            )

    def release(self) -> None:
        """Lets other processes use the folder."""
        if self._is_there():
            with contextlib.suppress(OSError):
                self._path.unlink()
        os.close(self._file)

    def _acquire(self) -> None:
        self._file = open_to_write(self._path)
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                os.close(self._file)
                raise CheckpointError(
                    f"another process is writing into {self.folder}; wait until it ends, or start a run of another name"
                ) from None
            self.note = f"{self.folder} cannot be locked ({error.strerror}); do not start a second process on it"

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._path, follow_symlinks=False), os.fstat(self._file))
        except OSError:
            return False

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()
