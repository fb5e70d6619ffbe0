"""Training images that are held out to choose settings by."""

from collections.abc import Sequence

import numpy as np

from localprop.errors import DataError


def hold_out(labels: Sequence[int], share: float, name: str, classes: list[str]) -> tuple[list[int], list[int]]:
    """Splits images, stratified by class. The split depends on nothing but its `labels` and `share`.

    Args:
        labels: of the training images.
        share: part to hold out, between 0 and 1.
        name: of the dataset, for errors.
        classes: names of the classes, in the order of their labels.

    Returns:
        Indices of the images to train on and of those held out, both ascending.

    Raises:
        DataError: a class would be missing on one side.
    """
    from sklearn.model_selection import train_test_split  # slow to import, and few runs need it

    counts = np.bincount(labels, minlength=len(classes))
    present = np.flatnonzero(counts)
    try:
        # Not the run's seed: runs with several seeds are compared on the same images.
        parts = train_test_split(np.arange(len(labels)), test_size=share, stratify=labels, random_state=0)
        complete = all(len(np.unique(np.take(labels, part))) == len(present) for part in parts)
    except ValueError:  # too few images, in one of several ways
        complete = False
    if not complete:
        smallest = min(present, key=counts.__getitem__)
        raise DataError(
            f"{name} has {counts[smallest]} training images of class {classes[smallest]!r}, too few for --val-split "
            f"{share} to hold some out and leave some; add images, or choose another part"
        )
    kept, held_out = (sorted(part.tolist()) for part in parts)
    return kept, held_out
