"""Plugins: Python files of the user that register methods, heads, decoders, tasks, datasets and models."""

import hashlib
import importlib.util
import sys
from pathlib import Path

from localprop.errors import ConfigError, first_line

_DIGEST = "__localprop_sha256__"


def load_plugin(path: Path | None, sha256: str | None = None) -> None:
    """Runs a Python file, once per process, as a module named after it. None is no file.

    Nothing that a file of a run or a suite names gets here: the user has named it on the command line.

    Args:
        path: the file.
        sha256: what its content has to be; None for any.

    Raises:
        ConfigError: there is no such file, it is another one, or it fails.
    """
    if path is None:
        return
    place = path.expanduser().resolve()
    name = f"localprop_plugin_{place.stem}"
    if name in sys.modules and sys.modules[name].__file__ == str(place):
        _require_same(path, sys.modules[name].__dict__[_DIGEST], sha256)
        return
    if not place.is_file():
        raise ConfigError(f"--plugin {path}: there is no such file here ({Path.cwd()})")
    spec = importlib.util.spec_from_file_location(name, place)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--plugin {path} is no Python file; its name ends with .py")
    # What is hashed is what runs: no bytecode beside it, and no second look at the file.
    content = place.read_bytes()
    _require_same(path, hashlib.sha256(content).hexdigest(), sha256)
    module = importlib.util.module_from_spec(spec)
    module.__dict__[_DIGEST] = hashlib.sha256(content).hexdigest()
    sys.modules[name] = module  # before it runs: dataclasses and timm's registry look their module up
    try:
        exec(compile(content, str(place), "exec"), module.__dict__)
    except Exception as error:  # whatever the user's code may raise
        del sys.modules[name]
        raise ConfigError(
            f"--plugin {path} fails ({type(error).__name__}: {first_line(error)}); run it by itself to see where"
        ) from error


def plugin_record(path: Path) -> dict[str, str]:
    """What a run records of the plugin that `load_plugin` has run: its path, and the SHA-256 of what ran."""
    place = path.expanduser().resolve()
    return {"path": str(path), "sha256": sys.modules[f"localprop_plugin_{place.stem}"].__dict__[_DIGEST]}


def _require_same(path: Path, found: str, expected: str | None) -> None:
    if expected not in (None, found):
        raise ConfigError(
            f"--plugin {path} is not the file that the run was trained with (SHA-256 {found[:12]}..., which was "
            f"{str(expected)[:12]}...): name that one with --plugin, or start a new run with this one"
        )
