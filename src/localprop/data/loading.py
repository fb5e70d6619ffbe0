"""From the user's settings to a dataset."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from localprop.data.base import Data
from localprop.data.identity import digest, identity_of
from localprop.data.images.decoding import SMALL_SIDE, read_images, small_sizes
from localprop.data.images.folder import Listing, list_evaluated, list_folder, refuse_image, skip_image
from localprop.data.images.memory import MemoryStore
from localprop.data.images.streaming import StreamStore
from localprop.data.sources import read_named
from localprop.data.split import hold_out
from localprop.data.view import SQUASHED, WHOLE
from localprop.errors import ConfigError
from localprop.registry import DATASETS
from localprop.settings.config import DataConfig
from localprop.tasks.base import task_of

FOLDER = "folder:"
_USUAL_SIDE = 224


def load_data(config: DataConfig, img_size: int | None, seed: int, default_img_size: int | None = None) -> Data:
    """Opens the dataset that `config` names.

    Named datasets, and folders whose images have at most 96 pixels on a side, are read into memory; the
    images of other folders are decoded batch by batch.

    Args:
        config: the data settings.
        img_size: side of the square input in pixels; by default the dataset's own, or for a folder
            `default_img_size`.
        seed: of order, augmentation and mixing.
        default_img_size: the side that suits the model; None where any does: then that of a folder's images if they
            are small and of one size, else 224.

    Raises:
        ConfigError: the name is unknown, or a setting has no meaning for it.
        DataError: the data are missing, damaged or inconsistent.
    """
    if config.data.startswith(FOLDER):
        return _load_folder(config, img_size or default_img_size, seed)
    if config.data not in DATASETS and Path(config.data).expanduser().is_dir():
        raise ConfigError(f"no dataset is called {config.data!r}; did you mean {FOLDER + config.data!r}?")
    DATASETS.lookup(config.data, also=[f"{FOLDER}PATH"])
    return _load_named(config, img_size, seed)


def _load_named(config: DataConfig, img_size: int | None, seed: int) -> Data:
    arrays, dataset = read_named(config.data, config), DATASETS[config.data]
    img_size = img_size or dataset.img_size
    store = MemoryStore(
        arrays.train_images,
        arrays.train_labels,
        arrays.test_images,
        arrays.test_labels,
        img_size,
        _crop_pad(config, arrays.train_images.shape[-1]),
        dataset.hflip if config.hflip is None else config.hflip,
        seed,
        hold_on_device=config.hold_on_device,
    )
    identity = identity_of(config.data, arrays.classes, store.train_size, store.test_size)
    mean, std = dataset.mean, dataset.std
    task = task_of(config, arrays.classes)
    return Data(config.data, arrays.classes, img_size, mean, std, store, task, config, seed, identity, store.view)


def folder_identity(config: DataConfig) -> dict[str, Any]:
    """The `Data.identity` of a folder, without decoding an image.

    Raises:
        ConfigError, DataError: as `load_data`.
    """
    return _identity(*_split_folder(config))


def load_evaluated(config: DataConfig, classes: list[str], img_size: int, seed: int) -> Data:
    """Opens the images of a folder that are evaluated, without any to train on.

    Args:
        config: the data settings; they name a folder.
        classes: names of the classes, in the order of their labels.
        img_size: side of the square input in pixels.
        seed: of what follows from `Data`.

    Raises:
        ConfigError, DataError: as `load_data`.
    """
    root = _root(config)
    return _opened(root, list_evaluated(root, classes), config, img_size, seed)


def _load_folder(config: DataConfig, img_size: int | None, seed: int) -> Data:
    return _opened(*_split_folder(config), config, img_size, seed)


def _opened(root: Path, found: Listing, config: DataConfig, img_size: int | None, seed: int) -> Data:
    others = config.workers > 0
    train_sizes = small_sizes(found.train, others)
    test_sizes = small_sizes(found.test, others) if train_sizes is not None else None
    final_sizes = small_sizes(found.final, others) if test_sizes is not None else None
    stores: Sequence[StreamStore] | Sequence[MemoryStore]
    if train_sizes is None or test_sizes is None or final_sizes is None:
        stores = _streamed(root, found, config, img_size or _USUAL_SIDE, seed)
    else:
        # The sizes of held-out images count as well, so that a split does not change how images are prepared.
        sizes = train_sizes | test_sizes if config.val_split or not found.train else train_sizes
        stores = _in_memory(found, config, img_size, seed, sizes, [test_sizes, final_sizes])
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    name, identity, store = root.resolve().name, _identity(root, found), stores[0]
    final = stores[1] if found.final else None
    view, img_size, notes = store.view, store.img_size, found.notes
    if found.train and view == SQUASHED:
        notes = [*notes, f"images in {root} are of several sizes, or not square; they are squeezed to be square"]
    task = task_of(config, found.classes)
    return Data(name, found.classes, img_size, mean, std, store, task, config, seed, identity, view, notes, final)


def _streamed(root: Path, found: Listing, config: DataConfig, img_size: int, seed: int) -> list[StreamStore]:
    """Stores that decode images batch by batch: of training and test images, and of the final test images."""
    for flag, given in (("crop-pad", config.crop_pad is not None), ("hold-on-device", config.hold_on_device)):
        if given and found.train:
            raise ConfigError(
                f"--{flag} is for images up to {SMALL_SIDE} pixels and some in {root} are larger; leave it out"
            )
    parts = [(found.train, found.test), ([], found.final)]
    return [StreamStore(*files, img_size, _hflip(config), seed, config.workers, config.bad_images) for files in parts]


def _in_memory(
    found: Listing,
    config: DataConfig,
    img_size: int | None,
    seed: int,
    sizes: set[tuple[int, int]],
    test_sizes: list[set[tuple[int, int]]],
) -> list[MemoryStore]:
    """Stores that hold all images: of training and test images, and of the final test images.

    Args:
        found: the files.
        config: the data settings.
        img_size: side of the input; by default that of the images, where all have the same.
        seed: of augmentation.
        sizes: (width, height) of training images.
        test_sizes: likewise of the images that each store evaluates.
    """
    width, height = next(iter(sizes)) if len(sizes) == 1 else (0, 0)
    uniform = width == height > 0
    img_size = img_size or (width if uniform else _USUAL_SIDE)
    # Images that differ are brought to one size; above the small side, that is left to the device.
    side = width if uniform else min(img_size, SMALL_SIDE)
    crop_pad = _crop_pad(config, side) if found.train else 0
    skipped: list[str] = []
    view = WHOLE if uniform else SQUASHED
    stores = []
    for train, test, own in zip((found.train, []), (found.test, found.final), test_sizes, strict=True):
        others = config.workers > 0
        train_images = read_images(train, side, partial(skip_image, skipped, limit=config.bad_images), others)
        test_images = read_images(test, side if own == {(side, side)} else None, refuse_image, others)
        images = (*train_images, *test_images)
        hold, hflip = config.hold_on_device, _hflip(config)
        stores.append(MemoryStore(*images, img_size, crop_pad, hflip, seed, skipped, hold, view))
    return stores


def _hflip(config: DataConfig) -> float:
    return 0.5 if config.hflip is None else config.hflip


def _root(config: DataConfig) -> Path:
    path = config.data.removeprefix(FOLDER)
    if not path:
        raise ConfigError(f"--data {config.data} names no folder; write folder:PATH")
    return Path(path).expanduser()


def _split_folder(config: DataConfig) -> tuple[Path, Listing]:
    """A folder and its files, with training images held out where `val_split` asks for it."""
    root = _root(config)
    found = list_folder(root, with_test=not config.val_split)
    if not config.val_split:
        return root, found
    # Of files, before any is read: an unreadable one does not move the others.
    labels = [file.label for file in found.train]
    parts = hold_out(labels, config.val_split, root.resolve().name, found.classes)
    kept, held_out = ([found.train[index] for index in part] for part in parts)
    return root, replace(found, train=kept, test=held_out)


def _identity(root: Path, found: Listing) -> dict[str, Any]:
    files = digest(root, [*found.train, *found.test, *found.final])
    return identity_of("folder", found.classes, len(found.train), len(found.test), len(found.final), files)


def _crop_pad(config: DataConfig, side: int) -> int:
    # Of a digit of 8 pixels even one pixel less cuts strokes off.
    usual = side // 8 if side >= 16 else 0
    pad = usual if config.crop_pad is None else config.crop_pad
    if not 0 <= pad < side:
        raise ConfigError(f"--crop-pad is {pad}; with images of {side} pixels it must be from 0 to {side - 1}")
    return pad
