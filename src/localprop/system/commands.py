"""Commands: those that messages print can be pasted into a shell, and those that localprop starts itself."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

# `python -m localprop` would look for every module in the current folder first, and that may be a stranger's.
_START = """\
import sys
if sys.path[:1] == [""]:
    del sys.path[0]
from importlib.util import find_spec
found = find_spec("localprop")
if found is None or found.origin != {origin!r}:
    sys.path.insert(0, {folder!r})
sys.argv[0] = "localprop"
from localprop.cli import main
sys.exit(main())
"""
_PACKAGE = Path(__file__).parents[1]


def command(*words: str | Path) -> str:
    """A localprop command, each word quoted where a shell needs that."""
    return shlex.join(["localprop", *map(str, words)])


def resume_command(folder: Path, plugin: Path | None = None, steps: int | None = None) -> str:
    """The command that resumes a run.

    Args:
        folder: the run folder.
        plugin: the one that the run's settings name.
        steps: after how many steps in all the run was to stop; None for its end.
    """
    stop = [] if steps is None else ["--steps", str(steps)]
    return command("train", "--resume", folder, *stop, *plugin_words(plugin))


def without_flag(words: Sequence[str], flag: str) -> tuple[list[str], list[str]]:
    """The words of a command without a flag that takes several values, and the values that it has there.

    Of a flag that is there twice the last one counts.
    """
    rest: list[str] = []
    values: list[str] = []
    inside = False
    for word in words:
        name, equals, value = word.partition("=")
        if name == flag:
            values, inside = [value] if equals else [], not equals
        elif inside and not word.startswith("-"):
            values.append(word)
        else:
            rest.append(word)
            inside = False
    return rest, values


def plugin_words(plugin: Path | None) -> list[str]:
    """The flag that names a plugin: a run's own files are not enough to run its code."""
    return ["--plugin", str(plugin)] if plugin else []


def interpreter_words(*words: str | Path) -> list[str]:
    """The words that start a localprop command in a process of its own, which runs no code of the current folder.

    The process runs the same code of localprop as this one, wherever this one found it.
    """
    code = _START.format(origin=str(_PACKAGE / "__init__.py"), folder=str(_PACKAGE.parent))
    return [sys.executable, "-c", code, *map(str, words)]
