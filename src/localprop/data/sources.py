"""The named datasets: scikit-learn's digits and random pixels, which need no files, and torchvision's.

torchvision compares each file with its published checksum before reading it (Fashion-MNIST's: on download),
so the pickles that CIFAR comes in are the published ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision import datasets

from localprop.data.split import hold_out
from localprop.errors import DataError, first_line, listing
from localprop.seeding import generator
from localprop.settings.config import DataConfig

Channels = tuple[float, float, float]


@dataclass(frozen=True)
class Arrays:
    """A dataset in memory: images (images, 3, side, side), uint8, and labels (images,), int64."""

    classes: list[str]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Named:
    """What is known of a named dataset.

    Args:
        read: from (folder, whether the training part, whether to download) to images, labels and classes.
        files: what it needs in the folder.
        img_size: side of the input where the user gives none.
        mean, std: of the training images' channels, in 0..1.
        hflip: chance of a horizontal flip where the user gives none; a mirrored digit is another sign.
    """

    read: Callable[[Path, bool, bool], tuple[Any, Any, list[str]]]
    files: tuple[str, ...]
    img_size: int
    mean: Channels
    std: Channels
    hflip: float = 0.5


def read_named(name: str, config: DataConfig) -> Arrays:
    """Reads, and where asked first downloads, the dataset `name`, a key of `NAMED`.

    With `val_split` the test part is held-out training images, and the true one is not read. torchvision still
    compares its files' checksums.

    Raises:
        DataError: files are missing or damaged, the download failed, or a class has too few images to hold out some.
    """
    named, root = NAMED[name], config.data_dir.expanduser()
    missing = _missing(named, root)
    if missing and not config.download:
        raise DataError(f"{name}: {root} lacks {listing(missing)}; put them there, or pass --download")
    try:
        *train, classes = named.read(root, True, config.download)
        test = None if config.val_split else named.read(root, False, config.download)[:2]
    except Exception as error:  # torchvision's readers and downloads raise a dozen types
        if missing := _missing(named, root):
            raise DataError(
                f"{name} could not be downloaded ({first_line(error)}); check the network, "
                f"or put {listing(missing)} into {root} by hand"
            ) from error
        # torchvision words a wrong checksum as advice to its programmer.
        what = "a checksum differs" if type(error) is RuntimeError else first_line(error)
        raise _unusable(name, root, what) from error
    images, labels = _checked(name, root, classes, *train)
    if test is not None:
        return Arrays(classes, images, labels, *_checked(name, root, classes, *test))
    kept, held = map(torch.tensor, hold_out(labels.tolist(), config.val_split, name, classes))
    return Arrays(classes, images.index_select(0, kept), labels[kept], images.index_select(0, held), labels[held])


def named_settings(name: str) -> dict[str, Any]:
    """What a named dataset settles where the user does not, for a folder of the same images; empty of unknown names."""
    named = NAMED.get(name)
    return {"img_size": named.img_size, "hflip": named.hflip} if named else {}


def _missing(named: Named, root: Path) -> list[str]:
    return [file for file in named.files if not (root / file).is_file()]


def _unusable(name: str, root: Path, what: str) -> DataError:
    places = sorted({str(root / file.split("/")[0]) for file in NAMED[name].files})
    return DataError(
        f"{name} cannot be read ({what}); if its files are damaged, delete {listing(places)} and pass --download"
    )


def _checked(name: str, root: Path, classes: list[str], images: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Images and labels as tensors; as many of the one as of the other, and no label without a class."""
    images, labels = torch.as_tensor(images).contiguous(), torch.as_tensor(labels, dtype=torch.int64)
    if len(images) != len(labels):
        raise _unusable(name, root, f"{len(images)} images and {len(labels)} labels")
    for label in labels.unique().tolist():
        if not 0 <= label < len(classes):
            raise _unusable(name, root, f"label {label}, outside 0 to {len(classes) - 1}")
    return images, labels


def _grey_to_rgb(images: Tensor) -> Tensor:
    return images.unsqueeze(1).repeat(1, 3, 1, 1)


def _digits(root: Path, train: bool, download: bool) -> tuple[Any, Any, list[str]]:
    bunch = load_digits()
    split = train_test_split(np.arange(len(bunch.target)), test_size=0.2, stratify=bunch.target, random_state=0)
    chosen = split[0 if train else 1]
    # Grey values go from 0 to 16.
    pixels = np.rint(bunch.images[chosen] * (255 / 16)).astype(np.uint8)
    return _grey_to_rgb(torch.from_numpy(pixels)), bunch.target[chosen], [str(digit) for digit in range(10)]


def _synthetic(root: Path, train: bool, download: bool) -> tuple[Any, Any, list[str]]:
    count = 1024 if train else 64
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator(0 if train else 1))
    return images, torch.arange(count) % 10, [f"class {number}" for number in range(10)]


def _cifar(kind: type[datasets.CIFAR10]) -> Callable:
    def read(root: Path, train: bool, download: bool) -> tuple[Any, Any, list[str]]:
        dataset = kind(root, train=train, download=download)
        return dataset.data.transpose(0, 3, 1, 2), dataset.targets, dataset.classes

    return read


def _stl10(root: Path, train: bool, download: bool) -> tuple[Any, Any, list[str]]:
    dataset = datasets.STL10(root, split="train" if train else "test", download=download)
    # torchvision knows the names only from a file that may be missing.
    names = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
    return dataset.data, dataset.labels, names


def _svhn(root: Path, train: bool, download: bool) -> tuple[Any, Any, list[str]]:
    dataset = datasets.SVHN(root, split="train" if train else "test", download=download)
    return dataset.data, dataset.labels, [str(digit) for digit in range(10)]


def _fashion_mnist(root: Path, train: bool, download: bool) -> tuple[Any, Any, list[str]]:
    dataset = datasets.FashionMNIST(root, train=train, download=download)
    return _grey_to_rgb(dataset.data), dataset.targets, dataset.classes


# Means and standard deviations are over all pixels of the training images.
NAMED = {
    "digits": Named(_digits, (), 16, (0.3054,) * 3, (0.3760,) * 3, hflip=0),
    "synthetic": Named(_synthetic, (), 32, (0.5,) * 3, (0.2898,) * 3),
    "cifar10": Named(
        _cifar(datasets.CIFAR10),
        tuple(
            f"cifar-10-batches-py/{file}"
            for file in [*(f"data_batch_{part}" for part in range(1, 6)), "test_batch", "batches.meta"]
        ),
        32,
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
    ),
    "cifar100": Named(
        _cifar(datasets.CIFAR100),
        tuple(f"cifar-100-python/{file}" for file in ["train", "test", "meta"]),
        32,
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
    ),
    "stl10": Named(
        _stl10,
        tuple(f"stl10_binary/{file}.bin" for file in ["train_X", "train_y", "unlabeled_X", "test_X", "test_y"]),
        96,
        (0.4467, 0.4398, 0.4066),
        (0.2603, 0.2566, 0.2713),
    ),
    "svhn": Named(
        _svhn,
        ("train_32x32.mat", "test_32x32.mat"),
        32,
        (0.4377, 0.4438, 0.4728),
        (0.1980, 0.2010, 0.1970),
        hflip=0,
    ),
    "fashion-mnist": Named(
        _fashion_mnist,
        tuple(
            f"FashionMNIST/raw/{split}-{part}-ubyte"
            for split in ["train", "t10k"]
            for part in ["images-idx3", "labels-idx1"]
        ),
        28,
        (0.2860,) * 3,
        (0.3530,) * 3,
    ),
}
