"""Help pages: readable on a narrow and on a wide terminal, and true."""

import docstring_parser
import pytest

from localprop.cli import COMMANDS, USAGE, main
from localprop.registry import DATASETS, DECODERS, HEADS, METHODS
from localprop.settings import config

PAGES = [*COMMANDS, "bench report"]


def page(words, capsys, monkeypatch, columns=80):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as stop:
        main([*words.split(), "--help"])
    assert not stop.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("words", PAGES)
def test_no_line_is_longer_than_the_terminal(words, columns, capsys, monkeypatch):
    lines = page(words, capsys, monkeypatch, columns).splitlines()
    assert max(map(len, lines)) <= columns


def test_the_list_of_commands_fits_a_narrow_terminal():
    assert max(map(len, USAGE.splitlines())) <= 80
    assert [line.split()[0] for line in USAGE.splitlines() if line.startswith("  ")] == list(COMMANDS)


KINDS = [value for name, value in vars(config).items() if name.endswith("Config")]


@pytest.mark.parametrize("kind", KINDS)
def test_no_help_text_is_broken_where_its_source_is(kind):
    for text in docstring_parser.parse_from_object(kind).params:
        assert "\n" not in (text.description or ""), text.arg_name


@pytest.mark.parametrize("command", ["train", "plan"])
def test_names_come_from_the_tables(command, capsys, monkeypatch):
    text = " ".join(page(command, capsys, monkeypatch, 1000).split())
    for table in (METHODS, HEADS, DECODERS):
        assert ", ".join(table) in text
    if command == "train":
        assert all(f"{name}," in text or f"{name} (" in text for name in DATASETS)


@pytest.mark.parametrize(
    ("words", "said"), [("eval", "RUN"), ("export", "RUN"), ("chain", "MODEL"), ("bench", "SUITE")]
)
def test_what_is_written_without_a_flag_has_a_name(words, said, capsys, monkeypatch):
    usage, *boxes = page(words, capsys, monkeypatch).splitlines()
    assert said in usage.split()
    assert any(line.strip("│| ").startswith(f"{said} ") for line in boxes)
