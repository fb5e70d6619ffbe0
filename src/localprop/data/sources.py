"""Named datasets: scikit-learn's digits and random pixels, which need no files, and torchvision's.

torchvision compares each file with its published checksum before reading it (Fashion-MNIST's: on download),
so the pickles that CIFAR comes in are the published ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets

from localprop.data.split import hold_out
from localprop.errors import ConfigError, DataError, first_line, listing
from localprop.registry import DATASETS
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
class ImageDataset:
    """A dataset of images that `--data` can name, and that is held in memory.

    A plugin adds one: `localprop.DATASETS.register("mine", localprop.ImageDataset(read, ...))`.

    Args:
        read: called with (folder, train, download): the `--data-dir`, whether the training part is asked for, and
            whether missing files may be downloaded. Returns images (count, 3, side, side), uint8, all of one side;
            labels (count,), whole numbers; and the names of the classes, in the order of their labels. Images and
            labels may be NumPy arrays or tensors. The same call must return the same images in the same order, in
            every process of a run.
        img_size: side of the network's input in pixels, where `--img-size` is not given.
        mean, std: of the channels of the training images, in 0..1.
        files: paths within the folder that `read` needs; a message names those that are missing.
        hflip: chance of a horizontal flip, where `--hflip` is not given; 0 where a mirrored image means something else.
    """

    read: Callable[[Path, bool, bool], tuple[Any, Any, list[str]]]
    img_size: int
    mean: Channels
    std: Channels
    files: tuple[str, ...] = ()
    hflip: float = 0.5


def read_named(name: str, config: DataConfig) -> Arrays:
    """Reads the dataset that `DATASETS` has under `name`, and downloads it first where asked.

    With `val_split`, training images are held out as the test part, and the true test images are not read.
    torchvision still compares their files' checksums.

    Raises:
        ConfigError: there is no such dataset, or what a plugin has registered is no `ImageDataset`.
        DataError: files are missing or damaged, the download failed, or a class has too few images to hold out some.
    """
    dataset, root = DATASETS.lookup(name), config.data_dir.expanduser()
    if not isinstance(dataset, ImageDataset):
        raise ConfigError(f"dataset {name!r} is a {type(dataset).__name__}; register a localprop.ImageDataset")
    missing = _missing(dataset, root)
    if missing and not config.download:
        raise DataError(f"{name}: {root} lacks {listing(missing)}; put them there, or pass --download")
    try:
        images, labels, classes = dataset.read(root, True, config.download)
        test_images, test_labels, _ = (None,) * 3 if config.val_split else dataset.read(root, False, config.download)
    except Exception as error:  # torchvision's readers and downloads raise a dozen types
        if missing := _missing(dataset, root):
            raise DataError(
                f"{name} could not be downloaded ({first_line(error)}); check the network, "
                f"or put {listing(missing)} into {root} by hand"
            ) from error
        # torchvision words a wrong checksum as advice to its programmer.
        what = "a checksum differs" if type(error) is RuntimeError else first_line(error)
        raise _unusable(name, root, what) from error
    images, labels = _checked(name, root, classes, images, labels)
    if not config.val_split:
        return Arrays(classes, images, labels, *_checked(name, root, classes, test_images, test_labels))
    train, test = map(torch.tensor, hold_out(labels.tolist(), config.val_split, name, classes))
    return Arrays(classes, images.index_select(0, train), labels[train], images.index_select(0, test), labels[test])


def named_settings(name: str) -> dict[str, Any]:
    """The settings that a named dataset chooses where the user does not; none for an unknown name."""
    dataset = DATASETS.get(name)
    return {"img_size": dataset.img_size, "hflip": dataset.hflip} if dataset else {}


def _missing(dataset: ImageDataset, root: Path) -> list[str]:
    return [file for file in dataset.files if not (root / file).is_file()]


def _unusable(name: str, root: Path, what: str) -> DataError:
    places = sorted({str(root / file.split("/")[0]) for file in DATASETS[name].files})
    remedy = f"if its files are damaged, delete {listing(places)} and pass --download"
    return DataError(f"{name} cannot be read ({what}); {remedy if places else 'correct the code that reads it'}")


def _checked(name: str, root: Path, classes: list[str], images: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Images and labels as tensors; as many of the one as of the other, and no label without a class."""
    try:
        images, labels = torch.as_tensor(images).contiguous(), torch.as_tensor(labels, dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _unusable(name, root, first_line(error)) from None
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (3, *images.shape[-1:] * 2):
        what = f"images of shape {tuple(images.shape)} and type {str(images.dtype).removeprefix('torch.')}"
        raise _unusable(name, root, f"{what}, expected (count, 3, side, side) and uint8")
    if labels.shape != images.shape[:1]:
        raise _unusable(name, root, f"{len(images)} images and {labels.numel()} labels")
    for label in labels.unique().tolist():
        if not 0 <= label < len(classes):
            raise _unusable(name, root, f"label {label}, outside 0 to {len(classes) - 1}")
    return images, labels


def _grey_to_rgb(images: Tensor) -> Tensor:
    return images.unsqueeze(1).repeat(1, 3, 1, 1)


def _digits(root: Path, train: bool, download: bool) -> tuple[Any, Any, list[str]]:
    from sklearn.datasets import load_digits  # slow to import, and only digits need it
    from sklearn.model_selection import train_test_split

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
DIGITS = ImageDataset(_digits, 16, (0.3054,) * 3, (0.3760,) * 3, hflip=0)  # a mirrored digit is another sign
SYNTHETIC = ImageDataset(_synthetic, 32, (0.5,) * 3, (0.2898,) * 3)
CIFAR10 = ImageDataset(
    _cifar(datasets.CIFAR10),
    32,
    (0.4914, 0.4822, 0.4465),
    (0.2470, 0.2435, 0.2616),
    tuple(
        f"cifar-10-batches-py/{file}"
        for file in [*(f"data_batch_{part}" for part in range(1, 6)), "test_batch", "batches.meta"]
    ),
)
CIFAR100 = ImageDataset(
    _cifar(datasets.CIFAR100),
    32,
    (0.5071, 0.4865, 0.4409),
    (0.2673, 0.2564, 0.2762),
    tuple(f"cifar-100-python/{file}" for file in ["train", "test", "meta"]),
)
STL10 = ImageDataset(
    _stl10,
    96,
    (0.4467, 0.4398, 0.4066),
    (0.2603, 0.2566, 0.2713),
    tuple(f"stl10_binary/{file}.bin" for file in ["train_X", "train_y", "unlabeled_X", "test_X", "test_y"]),
)
SVHN = ImageDataset(
    _svhn,
    32,
    (0.4377, 0.4438, 0.4728),
    (0.1980, 0.2010, 0.1970),
    ("train_32x32.mat", "test_32x32.mat"),
    hflip=0,
)
FASHION_MNIST = ImageDataset(
    _fashion_mnist,
    28,
    (0.2860,) * 3,
    (0.3530,) * 3,
    tuple(
        f"FashionMNIST/raw/{split}-{part}-ubyte"
        for split in ["train", "t10k"]
        for part in ["images-idx3", "labels-idx1"]
    ),
)
