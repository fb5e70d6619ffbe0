"""Tables of names: what they hold, what a plugin may do to them, and what a wrong name is told."""

import pytest
from torch import nn

import localprop
from localprop.data.sources import ImageDataset
from localprop.errors import ConfigError
from localprop.registry import DATASETS, DECODERS, HEADS, METHODS, MODELS, TASKS, Registry
from places import ROOT

PACKAGE = ROOT / "src" / "localprop"
KINDS = [(METHODS, type), (HEADS, type), (DECODERS, type), (TASKS, type), (DATASETS, ImageDataset)]


@pytest.fixture
def table():
    return Registry("fruit", {"sum": "math:fsum", "root": "math:sqrt"})


@pytest.mark.parametrize(("table", "kind"), KINDS, ids=lambda value: getattr(value, "noun", ""))
def test_every_entry_is_where_its_table_says(table, kind):
    assert all(isinstance(entry, kind) for entry in table.values())
    assert len({id(entry) for entry in table.values()}) == len(table)


@pytest.mark.parametrize(("table", "folder"), [(METHODS, "methods"), (HEADS, "heads"), (DECODERS, "decoders")])
def test_every_file_of_a_kind_is_in_its_table(table, folder):
    files = {path.stem for path in (PACKAGE / folder).glob("*.py")} - {"__init__", "common"}
    assert {entry.__module__ for entry in table.values()} == {f"localprop.{folder}.{file}" for file in files}


def test_a_table_is_a_mapping(table):
    import math

    assert (list(table), len(table), "sum" in table, "pear" in table) == (["sum", "root"], 2, True, False)
    assert table["root"] is table.lookup("root") is table.get("root") is math.sqrt
    assert table.get("pear") is None
    with pytest.raises(KeyError):
        table["pear"]
    table["pear"] = abs
    assert list(table.items())[-1] == ("pear", abs)
    del table["pear"]
    assert "pear" not in table


def test_register_is_a_function_and_a_decorator(table):
    @table.register("pear")
    class Pear:
        pass

    assert table["pear"] is Pear
    assert table.register("plum", abs) is table["plum"] is abs
    table.register("lazy", "math:cos")
    assert table["lazy"](0) == 1


def test_a_plugin_replaces_its_own_entry_but_none_of_localprop(table):
    table["pear"] = abs
    table["pear"] = max
    table["sum"] = table["sum"]
    with pytest.raises(ConfigError, match="localprop has a fruit called 'sum'; register yours under another name"):
        table.register("sum", max)
    with pytest.raises(ConfigError, match="localprop has a fruit"):
        table["sum"] = max
    del table["sum"]  # whoever does that means it
    table["sum"] = max
    assert (table["pear"], table["sum"]) == (max, max)


def test_a_wrong_name_is_told_a_similar_one(table):
    with pytest.raises(ConfigError, match=r"^no fruit is called 'rot'; did you mean 'root'\?$"):
        table.lookup("rot")
    with pytest.raises(ConfigError, match=r"^no fruit is called 'x'; known: root, sum$"):
        table.lookup("x")


def test_a_forgotten_name_is_one_line(table):
    with pytest.raises(ConfigError, match=r'such as register\("mine"\)'):
        table.register(max)


def test_the_tables_are_public_under_their_names():
    for name, table in (("METHODS", METHODS), ("HEADS", HEADS), ("DECODERS", DECODERS)):
        assert getattr(localprop, name) is table
        assert getattr(__import__(f"localprop.{name.lower()}", fromlist=[name]), name) is table
    assert (localprop.DATASETS, localprop.MODELS, localprop.TASKS) == (DATASETS, MODELS, TASKS)


def test_a_head_of_ones_own_is_found_where_heads_are_built(monkeypatch):
    monkeypatch.setitem(HEADS, "mine", lambda layout, outputs: nn.Identity())
    assert isinstance(localprop.heads.build_head("mine", None, 3), nn.Identity)
