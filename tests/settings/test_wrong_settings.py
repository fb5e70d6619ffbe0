"""Settings whose content is wrong: each works, or is one line that names the file."""

import pytest

from localprop.bench.suite import load_suite
from localprop.cli import main
from localprop.errors import ConfigError, LocalpropError
from localprop.settings.config import TrainConfig
from localprop.settings.flat import from_flat, to_flags
from localprop.settings.values import read_auto, read_yaml
from places import FIXTURES
from wrong_values import everything_wrong, one_line


def test_settings():
    settings = read_yaml(FIXTURES / "run-0.1" / "config.yaml")
    refused = 0
    for _, wrong in everything_wrong(settings):
        if isinstance(wrong, dict):
            try:
                to_flags(from_flat(wrong, "config.yaml"))
            except ConfigError as error:
                refused += 1
                one_line(error, "config.yaml", "--")
    assert refused > 300


LAUGHS = "a0: &a0 [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30)
)
YAMLS = {
    "laughs": (LAUGHS, "more than 100000 values once its aliases are written out"),
    "deep": ("model_kwargs: " + "[" * 5000, "nested too deep"),
    "rather deep": ("model_kwargs: " + "[" * 60 + "]" * 60, "nested too deep"),
    "itself": ("model_kwargs: &a {x: *a}", "contains itself"),
    "twice": ("lr: 1\nseed: 2\nlr: 3", "line 1: the key 'lr' is there twice"),
    "twice as a flag": ("batch-size: 1\nbatch_size: 2", "the key 'batch_size' is there twice"),
    "twice within": ("model_kwargs: {depth: 1, depth: 2}", "the key 'depth' is there twice"),
    "a class": ("lr: !!python/object/apply:os.system [id]", "line 1 is not valid YAML"),
    "no date": ("lr: 2020-99-99", "not valid YAML"),
    "no time": ("lr: !!timestamp x", "not valid YAML"),
    "no truth": ("lr: !!bool x", "not valid YAML"),
    "digits": ("seed: " + "9" * 6000, "not valid YAML"),
    "a list as a key": ("? [1]\n: 2", "not valid YAML"),
    "numbers as keys": ("1: 2\nx: 3", "unknown setting"),
    "no text": (b"lr: \xff", "it is no text in UTF-8"),
    "long": ("#" * (2**20 + 1), "it is longer than 1 MiB"),
    "two": ("lr: 1\n---\nlr: 2", "line 2 is not valid YAML"),
    "null byte": ('output: "a\\0b"', "output is 'a\\x00b', expected"),
    "no word for auto": ("recompute: maybe", "recompute is 'maybe', expected auto or true or false"),
    "a truth for a word": ("partition: on", "partition is True, expected 'balanced'"),
    "infinite": ("lr: " + "9" * 400, "lr is a number of more than 24 digits"),
}


@pytest.mark.parametrize("name", YAMLS)
def test_yaml_that_cannot_be_settings(tmp_path, capsys, name):
    content, line = YAMLS[name]
    path = tmp_path / "theirs.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["train", "-c", str(path)]) == 2
    error = capsys.readouterr().err
    assert line in error
    one_line(error.strip(), path)
    if name not in ("null byte", "deep"):
        with pytest.raises(LocalpropError):
            load_suite(str(path))


def test_aliases_that_do_no_harm_are_read(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model_kwargs: {depths: &two [2, 2], num_heads: *two}\nlr: 1e-3")
    assert read_yaml(path) == {"model_kwargs": {"depths": [2, 2], "num_heads": [2, 2]}, "lr": "1e-3"}


@pytest.mark.parametrize("word", ["auto", "on", "off", "'on'"])
def test_on_and_off_are_words_where_a_setting_has_them(tmp_path, word):
    path = tmp_path / "mine.yaml"
    path.write_text(f"cuda_graphs: {word}")
    assert from_flat(read_yaml(path), "mine.yaml").run.cuda_graphs == word.strip("'")


@pytest.mark.parametrize(("word", "value"), [("auto", None), ("true", True), ("True", True), ("false", False)])
def test_flags_and_files_have_the_same_words_for_recompute(tmp_path, word, value):
    path = tmp_path / "mine.yaml"
    path.write_text(f"recompute: {word}")
    assert from_flat(read_yaml(path), "mine.yaml").local.recompute is value
    assert read_auto(word) is value


def test_defaults_are_settings_that_can_be_read():
    assert from_flat({}, "nothing") == TrainConfig()
