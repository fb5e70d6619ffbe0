"""Commands that the documents show have flags that exist."""

import re

import pytest

from localprop.cli import COMMANDS, main
from places import ROOT

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def flags_of(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    return set(re.findall(r"--[a-z0-9][a-z0-9-]*", capsys.readouterr().out))


def commands(text):
    """(command, its flags) of each command in a block of code or in a line; a line that ends in \\ goes on."""
    text = text.replace("\\\n", " ")
    code = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    code += re.findall(r"`(localprop [^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL).replace("\n", " "))
    for line in code:
        for part in re.split(r"&&|\|\|", line.partition(" #")[0]):
            words = re.match(r".*?\blocalprop (bench report|\w+)(.*)", part)
            if words:
                yield words[1], re.findall(r"(?<=\s)--[a-z0-9][a-z0-9-]*", words[2])


def test_flags_exist(capsys, monkeypatch):
    known = {command: flags_of(command, capsys, monkeypatch) for command in (*COMMANDS, "bench report")}
    found = [(page, *one) for page in PAGES for one in commands((ROOT / page).read_text())]
    assert len(found) > 60
    for page, command, flags in found:
        assert command in known, f"{page}: localprop {command}"
        assert set(flags) <= known[command], f"{page}: localprop {command} has no {set(flags) - known[command]}"
