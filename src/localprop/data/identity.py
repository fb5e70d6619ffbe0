"""What a dataset is, in a few lines of JSON. A run is resumed only with the same data."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from localprop.data.images.walk import File
from localprop.errors import DataError, listing

_COUNTS = {"train_images": "training images", "evaluated_images": "evaluated images", "final_images": "test images"}


def identity_of(
    source: str,
    classes: list[str],
    train_images: int,
    evaluated_images: int,
    final_images: int = 0,
    files: str | None = None,
) -> dict[str, Any]:
    """A dataset's identity.

    Args:
        source: name of a named dataset, or "folder".
        classes: names of the classes, in the order of their labels.
        train_images: how many there are, unreadable ones included.
        evaluated_images: likewise.
        final_images: likewise; those that are evaluated once, after training.
        files: of a folder, what `digest` gives.
    """
    counts = {"train_images": train_images, "evaluated_images": evaluated_images, "final_images": final_images}
    return {"source": source, "classes": classes, **counts, "files": files}


def digest(root: Path, files: Iterable[File]) -> str:
    """SHA-256 of the names and sizes of files, wherever their folder `root` lies and in whatever order they are."""
    start = len(str(root / "x")) - 1  # relpath takes longer than walking the folder
    entries = sorted((os.fsencode(file.path[start:]), file.size) for file in files)
    lines = (b"%s\0%d\0" % entry for entry in entries)
    return hashlib.sha256(b"".join(lines)).hexdigest()


def require_same(before: Any, now: dict[str, Any], where: str, remedy: str = "start a new run") -> None:
    """Compares the identity of a run's data with that of the data that are there now.

    Args:
        before: as recorded; what it lacks is not compared.
        now: of the data that are there.
        where: what has been made from the data `before`, such as a run folder.
        remedy: what to do where the data cannot be restored.

    Raises:
        DataError: they differ, and it says in what; or `before` is no identity.
    """
    if not _is_identity(before):
        raise DataError(f"what {where} says of its data is damaged; {remedy}")
    if differences := _differences(before, now):
        raise DataError(f"the data are not those of {where}: {'; '.join(differences)}; restore them, or {remedy}")


def _is_identity(record: Any) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get("classes", []), list):
        return False
    words = [*record.get("classes", []), *(record.get(key) or "" for key in ("source", "files"))]
    counts = [record.get(key, 0) for key in _COUNTS]
    return all(isinstance(word, str) for word in words) and all(isinstance(count, int) for count in counts)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    found = []
    old, new = before.get("source", now["source"]), now["source"]
    if old != new:
        found.append(f"{old} then, {new} now")
    old, new = before.get("classes", now["classes"]), now["classes"]
    if len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        changed = [f"class {label} was {a!r} and is now {b!r}" for label, (a, b) in pairs if a != b]
    else:
        changed = [f"class {name!r} is {'gone' if name in old else 'new'}" for name in sorted(set(old) ^ set(new))]
        changed = changed or [f"{len(old)} classes then, {len(new)} now"]
    found += [listing(changed)] if changed else []
    for key, words in _COUNTS.items():
        if before.get(key, now[key]) != now[key]:
            found.append(f"{words}: {before[key]} then, {now[key]} now")
    if not found and before.get("files", now["files"]) != now["files"]:
        found.append("as many images of the same classes, with other names or sizes")
    return found
