"""Folders of images: `PATH/train/<class>/*` and `PATH/test/<class>/*` or `PATH/val/<class>/*`."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from localprop.data.images.walk import File, Passed, class_names, find_images
from localprop.errors import DataError, listing


class Unreadable(NamedTuple):
    """The path of an image that cannot be read, and what is wrong with it, path included."""

    path: str
    problem: str


OnUnreadable = Callable[[Unreadable], None]


@dataclass(frozen=True)
class Listing:
    """What a folder holds.

    Attributes:
        classes: names, sorted.
        train, test: images to train on and to evaluate.
        final: test images to evaluate once, after training, where `test` is for choosing settings.
        notes: lines for the user.
    """

    classes: list[str]
    train: list[File]
    test: list[File]
    final: list[File]
    notes: list[str]


def list_folder(root: Path, with_test: bool = True) -> Listing:
    """Lists classes, training and, `with_test`, test images of a folder.

    Where test/ and val/ are both there, val/ is evaluated during training, and test/ after it.

    Raises:
        DataError: a folder is missing, empty or unreadable, a test class is none to train on, or as `find_images`.
    """
    _require_folder(root)
    train = root / "train"
    if not train.is_dir():
        raise DataError(f"{root} has no folder train/; put the training images into {train / '<class>'}")
    tests = [root / name for name in ("val", "test") if (root / name).is_dir()] if with_test else []
    if with_test and not tests:
        raise DataError(
            f"{root} has no folder test/ or val/; put the test images into {root / 'test' / '<class>'}, "
            f"or hold training images out with --val-split"
        )
    classes = class_names(train)
    if len(classes) < 2:
        raise DataError(f"{train} has {len(classes)} class folders; it needs one for each of two or more classes")
    found = _Parts(root, classes)
    # What is wrong with a class is said of all its folders at once, before any is searched.
    for folder in tests:
        found.require_known(folder)
    files = found.images(train)
    if empty := found.without_images(files):
        raise DataError(f"no images in {listing(train / name for name in empty)}; fill the class folder or delete it")
    evaluated = [found.test_images(folder) for folder in tests] + [[], []]
    return Listing(classes, files, evaluated[0], evaluated[1], found.notes())


def list_evaluated(root: Path, classes: list[str]) -> Listing:
    """Lists test images of a folder that was perhaps never trained on: test/, else val/, else class folders in it.

    Args:
        root: the folder.
        classes: names, in the order of their labels. Some may have no images.

    Raises:
        DataError: there are no such folders, a class is unknown, there is no image at all, or as `find_images`.
    """
    _require_folder(root)
    parts = [root / name for name in ("test", "val") if (root / name).is_dir()]
    if not parts and not set(classes) & set(class_names(root)):
        hint = f"; for the training images name {root / 'train'}" if (root / "train").is_dir() else ""
        raise DataError(f"{root} has neither test/ nor val/ nor a folder for any of {listing(classes)}{hint}")
    found = _Parts(root, classes)
    folder = parts[0] if parts else root
    found.require_known(folder)
    return Listing(classes, [], found.test_images(folder), [], found.notes())


class _Parts:
    """The parts of a folder, and what is to be said of them."""

    def __init__(self, root: Path, classes: list[str]) -> None:
        self._root, self._classes = root, classes
        self._labels = {name: label for label, name in enumerate(classes)}
        self._passed: list[Passed] = []
        self._lacking: list[str] = []

    def require_known(self, folder: Path) -> None:
        if unknown := [name for name in class_names(folder) if name not in self._labels]:
            raise DataError(
                f"{folder} has folders of classes that are not trained on: {listing(map(repr, unknown))}; the classes "
                f"are {listing(map(repr, self._classes))}"
            )

    def images(self, folder: Path) -> list[File]:
        found = find_images(folder, self._labels)
        self._passed += found.passed
        return found.files

    def without_images(self, files: list[File]) -> list[str]:
        filled = {file.label for file in files}
        return [name for name, label in self._labels.items() if label not in filled]

    def test_images(self, folder: Path) -> list[File]:
        files = self.images(folder)
        if not files:
            raise DataError(f"no images in {folder}; put some into {folder / '<class>'}")
        if empty := self.without_images(files):
            self._lacking.append(
                f"no images in {folder} of {listing(map(repr, empty))}: accuracy is of the other classes only"
            )
        return files

    def notes(self) -> list[str]:
        if not self._passed:
            return self._lacking
        names = [f"{os.path.relpath(path, self._root)} ({why})" for path, why in self._passed]
        return [*self._lacking, f"passed over in {listing([self._root])}: {listing(names)}"]


def _require_folder(root: Path) -> None:
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; --data folder:PATH needs PATH/train and PATH/test or PATH/val")


def skip_image(skipped: list[str], bad: Unreadable, limit: int) -> None:
    """Notes an unreadable training image in `skipped`.

    Raises:
        DataError: there are now more than `limit`.
    """
    if bad.path in skipped:
        return
    if len(skipped) >= limit:
        raise DataError(
            f"{bad.problem}, and {len(skipped)} training images before it; repair or delete them, "
            f"or allow more with --bad-images"
        )
    skipped.append(bad.path)


def refuse_image(bad: Unreadable) -> None:
    """Ends an evaluation over an unreadable image: an accuracy is over all images or it is another number.

    Raises:
        DataError: always.
    """
    raise DataError(f"{bad.problem}, and evaluation leaves nothing out; repair or delete it")
