"""Which files of a folder are taken for images: hidden ones, links, special files, suffixes, nested classes."""

import errno
import os
import shutil
import socket
from pathlib import Path

import pytest
from PIL import EpsImagePlugin, Image
from torchvision.datasets.folder import make_dataset

from localprop.data.images.reading import FORMATS, read_image
from localprop.data.images.walk import find_images
from localprop.data.loading import load_data
from localprop.errors import DataError
from localprop.settings.config import DataConfig


def picture(path: Path, side: int = 8, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), (200, 30, 90)).save(path, **options)
    return path


@pytest.fixture
def root(tmp_path):
    """Three images in each of two classes, for training and for testing."""
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            for number in range(3):
                picture(tmp_path / "pets" / part / name / f"{number}.png")
    return tmp_path / "pets"


def found(folder: Path) -> list[str]:
    return [os.path.relpath(file.path, folder) for file in find_images(folder, {"cat": 0, "dog": 1}).files]


def passed(folder: Path) -> dict[str, str]:
    return {os.path.relpath(path, folder): why for path, why in find_images(folder, {"cat": 0, "dog": 1}).passed}


CAT, DOG = ([f"{name}/{number}.png" for number in range(3)] for name in ("cat", "dog"))


def test_ordinary_folders_keep_the_order_that_they_always_had(root):
    train = root / "train"
    for name in (
        "cat/a/1.jpg",
        "cat/a-b/2.PNG",
        "cat/a/x/3.webp",
        "cat/a.b/4.bmp",
        "cat/Z.tiff",
        "cat/é.png",
        "dog/10.pgm",
    ):
        picture(train / name)
    shutil.copytree(train / "dog", train / "cat" / "b" / "c")
    expected = make_dataset(train, {"cat": 0, "dog": 1}, is_valid_file=lambda path: True)
    files = find_images(train, {"cat": 0, "dog": 1}).files
    assert [(file.path, file.label) for file in files] == expected
    assert [file.size for file in files] == [os.path.getsize(path) for path, _ in expected]


def test_hidden_files_and_folders_are_passed_over_at_any_depth(root):
    train = root / "train"
    for name in ("cat/.ipynb_checkpoints/0.png", "cat/new/.thumbs/deep/0.png", "cat/._1.png", ".trash/0.png"):
        picture(train / name)
    assert found(train) == CAT + DOG
    assert passed(train) == dict.fromkeys(
        [".trash", "cat/._1.png", "cat/.ipynb_checkpoints", "cat/new/.thumbs"], "hidden"
    )


def test_links_that_lead_back_are_followed_once(root):
    train = root / "train"
    for name, target in [("self", "."), ("up", ".."), ("top", "../.."), ("loop", "loop")]:
        (train / "cat" / name).symlink_to(target)
    (train / "cat" / "more").mkdir()
    picture(train / "cat" / "more" / "9.png")
    (train / "cat" / "again").symlink_to("more")
    assert found(train) == [*CAT, "cat/more/9.png", *DOG]
    assert set(passed(train)) == {f"cat/{name}" for name in ("self", "up", "top", "loop", "again")}
    data = load_data(DataConfig(data=f"folder:{root}"), 8, 0)
    assert (data.train_size, data.test_size) == (7, 6)


def test_links_to_images_and_folders_elsewhere_are_images(root, tmp_path):
    train = root / "train"
    picture(tmp_path / "pool" / "sub" / "1.png")
    (train / "cat" / "pool").symlink_to(tmp_path / "pool")
    (train / "cat" / "9.png").symlink_to(tmp_path / "pool" / "sub" / "1.png")
    shutil.move(train / "dog", tmp_path / "dogs")
    (train / "dog").symlink_to(tmp_path / "dogs")
    assert found(train) == [*CAT, "cat/9.png", "cat/pool/sub/1.png", *DOG]


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("cat/dogs", "../dog"),  # before dog is visited
        ("cat/some", "../dog/some"),
        ("dog/cats", "../cat"),
        ("kitten", "cat"),
    ],
)
def test_a_folder_of_two_classes_is_refused(root, link, target):
    (root / "train" / "dog" / "some").mkdir()
    (root / "train" / link).symlink_to(target)
    with pytest.raises(DataError, match=r"are the same folder") as caught:
        load_data(DataConfig(data=f"folder:{root}", val_split=0.5), 8, 0)
    assert str(root / "train" / link) in str(caught.value)


def test_a_nested_folder_of_another_class_is_refused(root):
    picture(root / "train" / "cat" / "2024" / "dog" / "0.png")
    with pytest.raises(DataError) as caught:
        load_data(DataConfig(data=f"folder:{root}"), 8, 0)
    nested, own = root / "train" / "cat" / "2024" / "dog", root / "train" / "dog"
    assert str(caught.value) == (
        f"{nested} has the name of class 'dog' and lies in class 'cat'; move its images into {own}, or rename it"
    )


def test_of_its_own_class_a_nested_folder_is_a_folder(root):
    picture(root / "train" / "cat" / "cat" / "0.png")
    assert found(root / "train") == [*CAT, "cat/cat/0.png", *DOG]


def test_special_files_are_never_opened(root):
    train = root / "train"
    for name in ("pipe.png", "pipe"):
        os.mkfifo(train / "cat" / name)
    (train / "dog" / "link.png").symlink_to(train / "cat" / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.getcwd()
        os.chdir(train / "cat")  # the path of a socket is short
        try:
            listening.bind("s.png")
        finally:
            os.chdir(here)
        (train / "dog" / "null.png").symlink_to("/dev/null")
        assert found(train) == CAT + DOG
    special = ["cat/pipe", "cat/pipe.png", "cat/s.png", "dog/link.png", "dog/null.png"]
    assert passed(train) == dict.fromkeys(special, "no regular file")
    assert load_data(DataConfig(data=f"folder:{root}"), 8, 0).train_size == 6


def test_images_of_every_common_format_are_found_and_read(root, tmp_path):
    cat = root / "train" / "cat"
    forms = {"a.avif": "AVIF", "b.gif": "GIF", "c.jfif": "JPEG", "d.JPE": "JPEG", "e": "PNG", "f.jpg_large": "JPEG"}
    forms = {name: form for name, form in forms.items() if form in FORMATS}
    for name, form in forms.items():
        picture(cat / name, format=form)
    assert found(root / "train") == sorted([*CAT, *(f"cat/{name}" for name in forms)]) + DOG
    for name in forms:
        assert read_image(str(cat / name)).getpixel((4, 4)) == pytest.approx((200, 30, 90), abs=20)
    assert load_data(DataConfig(data=f"folder:{root}"), 8, 0).train_size == 6 + len(forms)


def test_no_other_format_is_opened_whatever_its_name(root, monkeypatch):
    """Pillow runs a program to read EPS."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("a program is run"))
    cat = root / "train" / "cat"
    for name in ("drawing", "drawing.eps", "drawing.png"):
        picture(cat / name, format="EPS")
    picture(cat / "icon.ico", format="ICO")
    assert found(root / "train") == [*CAT, "cat/drawing.png", *DOG]
    assert set(passed(root / "train").values()) == {"no image"}
    with pytest.raises(DataError, match="not an image"):
        read_image(str(cat / "drawing.png"))
    data = load_data(DataConfig(data=f"folder:{root}"), 8, 0)
    assert (data.train_size, data.skipped) == (6, [str(cat / "drawing.png")])


def test_a_link_to_nowhere_is_a_missing_image(root):
    cat = root / "train" / "cat"
    (cat / "9.png").symlink_to("gone.png")
    (cat / "notes").symlink_to("gone")
    data = load_data(DataConfig(data=f"folder:{root}"), 8, 0)
    assert data.skipped == [str(cat / "9.png")]
    assert passed(root / "train") == {"cat/notes": "a link to nowhere"}


def test_what_is_passed_over_is_named_in_one_line(root):
    assert load_data(DataConfig(data=f"folder:{root}"), 8, 0).notes == []
    (root / "train" / "read.me").write_text("x")
    picture(root / "train" / "loose.png")
    for number in range(4):
        (root / "test" / "cat" / f"{number}.txt").write_text("x")
    (root / "train" / "dog" / "a\x1b[2J\nb\udcff.md").write_text("x")
    (note,) = load_data(DataConfig(data=f"folder:{root}"), 8, 0).notes
    assert note == (
        f"passed over in {root}: train/dog/a\\x1b[2J\\nb\\udcff.md (no image), train/loose.png (in no class folder), "
        "train/read.me (in no class folder), test/cat/0.txt (no image), test/cat/1.txt (no image) and 2 more"
    )


def test_names_break_no_line_and_command_no_terminal(root):
    shutil.copytree(root / "train" / "cat", root / "test" / "a\n\x1b[2Jb")
    (root / "test" / "c\nd").mkdir()
    with pytest.raises(DataError) as caught:
        load_data(DataConfig(data=f"folder:{root}"), 8, 0)
    assert str(caught.value).isprintable()
    assert "c\\nd" in str(caught.value)


def test_a_folder_that_may_not_be_read_is_said(root, monkeypatch):
    locked, scan = root / "train" / "cat" / "locked", os.scandir
    locked.mkdir()

    def refuse(path):
        if path == str(locked):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read every folder
    with pytest.raises(DataError, match=f"cannot read the folder {locked}: Permission denied"):
        load_data(DataConfig(data=f"folder:{root}"), 8, 0)
