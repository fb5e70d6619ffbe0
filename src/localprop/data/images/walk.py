"""Which files of a folder are images, found without opening anything but regular files."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from localprop.data.images.reading import has_known_suffix, image_size
from localprop.errors import DataError

_Inode = tuple[int, int]


class File(NamedTuple):
    """The path of an image, its label, and its size in bytes."""

    path: str
    label: int
    size: int = 0


class Passed(NamedTuple):
    """The path of something that is no image to train on or to evaluate, and why."""

    path: str
    why: str


@dataclass
class Found:
    """What `find_images` found."""

    files: list[File] = field(default_factory=list)
    passed: list[Passed] = field(default_factory=list)


def class_names(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted; hidden ones, which notebooks leave behind, are no classes."""
    return sorted(entry.name for entry in _scan(str(folder)) if _is_folder(entry) and not entry.name.startswith("."))


def find_images(folder: Path, labels: dict[str, int]) -> Found:
    """Finds the images in the class folders of `folder`, at any depth.

    Links are followed, and each folder is visited once. Images are sorted by class, then by folder, then by name. A
    file whose suffix is unknown is an image if its header is one. A link to nowhere with an image's suffix counts as
    an image, so that its absence is met when it is decoded.

    Args:
        folder: holds a folder for each class, or for some.
        labels: of the classes, by name.

    Raises:
        DataError: a folder cannot be read, belongs to two classes, or has the name of another class than its own.
    """
    walk = _Walk(str(folder), labels)
    for entry in _scan(str(folder)):
        if entry.name in labels and _is_folder(entry):
            walk.class_folder(entry.path, labels[entry.name])
        else:
            walk.passed.append(Passed(entry.path, "hidden" if entry.name.startswith(".") else "in no class folder"))
    walk.follow_links()
    return Found(list(walk.files()), sorted(walk.passed))


class _Walk:
    def __init__(self, folder: str, labels: dict[str, int]) -> None:
        self._folder, self._labels = folder, labels
        self._names = {label: name for name, label in labels.items()}
        # Where each folder was met first; those that hold all classes belong to none of them.
        self._seen: dict[_Inode, tuple[str, int | None]] = {}
        real = Path(folder).resolve()
        for above in (real, *real.parents):
            self._seen[_inode(str(above))] = (str(above), None)
        self._roots: list[tuple[str, int]] = []
        self._links: list[tuple[str, int]] = []
        self._files: list[tuple[int, str, str, int]] = []
        self.passed: list[Passed] = []

    def class_folder(self, path: str, label: int) -> None:
        """Takes in a class folder, before any is visited: a link to one must not visit it first."""
        if (other := self._seen.get(_inode(path))) is not None:
            raise DataError(f"{path} and {other[0]} are the same folder; each class needs one of its own")
        self._seen[_inode(path)] = (path, label)
        self._roots.append((path, label))

    def follow_links(self) -> None:
        """Visits all folders: first those that really lie in a class, then those that links lead to."""
        for path, label in self._roots:
            self._visit(path, label)
        while self._links:
            links, self._links = sorted(self._links), []
            for path, label in links:
                if self._is_new(path, label):
                    self._visit(path, label)

    def files(self) -> Iterator[File]:
        """All images, in their order."""
        for label, folder, name, size in sorted(self._files):
            yield File(os.path.join(folder, name), label, size)

    def _is_new(self, path: str, label: int) -> bool:
        """Whether a folder within a class has not been visited; it counts as visited from now on."""
        inode = _inode(path)
        if inode not in self._seen:
            self._seen[inode] = (path, label)
            return True
        first, owner = self._seen[inode]
        if owner not in (None, label):
            raise DataError(f"{path} and {first} are the same folder, of two classes; remove the link from one of them")
        self.passed.append(Passed(path, f"leads to {first} again"))
        return False

    def _visit(self, folder: str, label: int) -> None:
        folders = [folder]
        while folders:
            folder = folders.pop()
            for entry in _scan(folder):
                if entry.name.startswith("."):
                    self.passed.append(Passed(entry.path, "hidden"))
                elif not _is_folder(entry):
                    self._take(entry, folder, label)
                else:
                    self._require_own(entry.path, entry.name, label)
                    if entry.is_symlink():
                        self._links.append((entry.path, label))
                    elif self._is_new(entry.path, label):
                        folders.append(entry.path)

    def _require_own(self, path: str, name: str, label: int) -> None:
        if self._labels.get(name, label) != label:
            raise DataError(
                f"{path} has the name of class {name!r} and lies in class {self._names[label]!r}; move its images "
                f"into {os.path.join(self._folder, name)}, or rename it"
            )

    def _take(self, entry: os.DirEntry, folder: str, label: int) -> None:
        try:
            status = entry.stat()
        except OSError:
            if not has_known_suffix(entry.name):
                self.passed.append(Passed(entry.path, "a link to nowhere"))
                return
            self._files.append((label, folder, entry.name, 0))
            return
        if not stat.S_ISREG(status.st_mode):
            self.passed.append(Passed(entry.path, "no regular file"))
        elif has_known_suffix(entry.name) or image_size(entry.path):
            self._files.append((label, folder, entry.name, status.st_size))
        else:
            self.passed.append(Passed(entry.path, "no image"))


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _inode(path: str) -> _Inode:
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check its permissions") from None
    return status.st_dev, status.st_ino


def _scan(folder: str) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror}; check its permissions") from None
