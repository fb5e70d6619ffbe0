"""Processes that were told different things do not train together: one line names what differs and nothing hangs."""

import dataclasses
import os
from pathlib import Path

import pytest
from PIL import Image

from localprop.parallel import agreement
from localprop.parallel.agreement import data_facts, difference, facts
from localprop.settings.config import TrainConfig
from localprop.settings.flat import from_flat, to_flat
from ranks import CALM, MODULES

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
REMEDY = "start all processes with the same settings, code and data"


def told(**settings):
    """What a process tells that was started with these settings."""
    return facts(from_flat(settings, "a test"), None, "cpu")


def start(forker, tmp_path, ours, others, attempt=None):
    """Starts two processes that differ in a flag; gives what they say when both have ended in failure."""
    common = ["train", *CALM, "--cuts", *MODULES[2], "--output", str(tmp_path), "--parallel", "modules"]
    ranks = forker.start(tmp_path / "log", 2, attempt, argv=([*common, *ours], [*common, *others]))
    assert ranks.wait() == [2, 2], ranks.log.read_text()
    assert list(tmp_path.glob("*/config.yaml")) == []
    return ranks.log.read_text()


@pytest.mark.processes
@needs_fork
@pytest.mark.parametrize(
    ("ours", "others", "line"),
    [
        (["--lr", "0.01"], ["--lr", "0.02"], "--lr is 0.01 in rank 0 and 0.02 in rank 1"),
        (["--batch-size", "64"], ["--batch-size", "32"], "--batch-size is 64 in rank 0 and 32 in rank 1"),
        ([], ["--micro-batches", "2"], "--micro-batches is 1 in rank 0 and 2 in rank 1"),
        ([], ["--cuts", "patch_embed"], '--cuts is ["layers.0"] in rank 0 and ["patch_embed"] in rank 1'),
        ([], ["--parallel", "data"], "--parallel is modules in rank 0 and data in rank 1"),
    ],
)
def test_processes_with_other_settings_end_with_a_line_that_names_the_flag(forker, tmp_path, ours, others, line):
    assert start(forker, tmp_path, ours, others) == f"localprop: {line}; {REMEDY}\n"


@pytest.mark.processes
@needs_fork
def test_processes_that_torchrun_starts_compare_their_settings_too(forker, tmp_path):
    said = start(forker, tmp_path, [], ["--seed", "7"], attempt=0)
    assert said == f"localprop: --seed is 42 in rank 0 and 7 in rank 1; {REMEDY}\n"


@pytest.mark.processes
@needs_fork
def test_processes_with_other_images_end_with_a_line(forker, tmp_path):
    places = [tmp_path / "here" / "images", tmp_path / "there" / "images"]
    for place, images in zip(places, (2, 3), strict=True):
        for split in ("train", "test"):
            for name in ("cat", "dog"):
                (place / split / name).mkdir(parents=True)
                for number in range(images):
                    Image.new("RGB", (8, 8)).save(place / split / name / f"{number}.png")
    own = [["--data", f"folder:{place}", "--batch-size", "4", "--img-size", "8"] for place in places]
    said = start(forker, tmp_path, *own)
    assert said == f"localprop: the number of train images is 4 in rank 0 and 6 in rank 1; {REMEDY}\n"


@pytest.mark.parametrize("name", sorted(set(to_flat(TrainConfig())) - {"resume", "plugin"}))
def test_every_setting_is_compared_but_for_those_of_a_machine(name):
    """A flag that is added later is compared as well."""
    config = TrainConfig()
    for section in dataclasses.fields(config):
        part = getattr(config, section.name)
        if hasattr(part, name):  # behind the check of values: any other value will do
            object.__setattr__(part, name, "folder:elsewhere" if name == "data" else "another")
    found = difference([told(), facts(config, None, "cpu")])
    if name in ("device", "workers", "data_dir", "download", "nproc"):
        assert found is None
    else:
        assert found.startswith(f"--{name.replace('_', '-')} is ")


def test_a_folder_may_lie_elsewhere_on_another_machine():
    assert difference([told(data="folder:/a/images"), told(data="folder:/b/images")]) is None
    assert "--data is folder: in rank 0 and cifar10" in difference([told(data="folder:/a"), told(data="cifar10")])


def test_what_else_is_compared(tmp_path, monkeypatch):
    plugins = [tmp_path / name / "plugin.py" for name in "abc"]
    for plugin, text in zip(plugins, ("x = 1", "x = 1", "x = 2"), strict=True):
        plugin.parent.mkdir()
        plugin.write_text(text)
    one, same, other = (told(plugin=str(plugin)) for plugin in plugins)
    assert difference([one, same]) is None  # wherever it lies
    assert difference([one, other]).startswith("the content of --plugin is SHA-256 ")
    assert difference([one, told()]).startswith("the content of --plugin is SHA-256 ")
    assert difference([one, told(plugin=str(tmp_path / "gone.py"))]).endswith(f"and no file in rank 1; {REMEDY}")
    config = TrainConfig()
    assert difference([facts(config, None, "cpu"), facts(config, None, "cuda")]).startswith("the type of --device is")
    assert difference([facts(config, Path("a"), "cpu"), facts(config, None, "cpu")]).startswith("--resume is a in rank")
    before = told()
    own = agreement.versions()["localprop"]
    monkeypatch.setattr(agreement, "versions", lambda: {"localprop": own, "torch": "2.9.0+cpu"})
    monkeypatch.setattr(agreement.platform, "python_version_tuple", lambda: ("3", "9", "1"))
    now = told()
    assert {name for name in before if before[name] != now.get(name)} == {
        f"the version of {name}" for name in before_versions(before) if name != "localprop"
    }
    assert now["the version of torch"] == "2.9.0"  # of whatever build
    assert now["the version of Python"] == "3.9"


def before_versions(told):
    return [name.removeprefix("the version of ") for name in told if name.startswith("the version of ")]


def test_the_line_names_values_and_ranks():
    one, two = {"--a": 1, "--b": {"c": [1.5]}}, {"--a": 1, "--b": {"c": [2.5]}}
    assert difference([one, one, one]) is None
    assert difference([one, two, one, two]) == (
        f'--b is {{"c": [1.5]}} in ranks 0, 2 and {{"c": [2.5]}} in ranks 1, 3; {REMEDY}'
    )
    assert " is 1 in ranks 0 to 7 and 2 in rank 8; " in difference([{"--a": 1}] * 8 + [{"--a": 2}])
    assert " is not given in rank 0 and 2 in rank 1; " in difference([{"--a": None}, {"--a": 2}])
    many = difference([{"--a": rank} for rank in range(100)])
    assert len(many) < 200
    long = difference([{"--a": "x" * 10**6}, {"--a": "y" * 10**6}])
    assert len(long) < 1000
    assert "\n" not in difference([{"--a": "x\ny"}, {"--a": "z"}])


def test_data_are_compared_class_by_class():
    one = {"source": "folder", "classes": ["cat", "dog"], "train_images": 4, "evaluated_images": 2, "files": "ab"}
    assert difference([data_facts(one), data_facts(dict(one))]) is None
    for name, value, line in [
        ("source", "digits", "the source of the data is folder in rank 0 and digits in rank 1"),
        ("classes", ["cat"], "the number of classes is 2 in rank 0 and 1 in rank 1"),
        ("classes", ["dog", "cat"], "the name of class 0 is cat in rank 0 and dog in rank 1"),
        ("evaluated_images", 3, "the number of evaluated images is 2 in rank 0 and 3 in rank 1"),
        ("files", "cd", "the SHA-256 of the images' names and sizes is ab in rank 0 and cd in rank 1"),
    ]:
        assert difference([data_facts(one), data_facts(one | {name: value})]) == f"{line}; {REMEDY}"
