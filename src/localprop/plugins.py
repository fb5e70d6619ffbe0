"""Code of the user's own: a Python file that adds methods, heads, decoders or timm models before they are looked up."""

import importlib.util
import sys
from pathlib import Path

from localprop.errors import ConfigError


def load_plugin(path: Path | None) -> None:
    """Runs a Python file, once per process, as a module named after it. None is no file.

    Raises:
        ConfigError: there is no such file, or it fails.
    """
    if path is None:
        return
    place = path.expanduser().resolve()
    name = f"localprop_plugin_{place.stem}"
    if name in sys.modules and sys.modules[name].__file__ == str(place):
        return
    if not place.is_file():
        raise ConfigError(f"--plugin {path}: there is no such file here ({Path.cwd()})")
    spec = importlib.util.spec_from_file_location(name, place)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--plugin {path} is no Python file; its name ends with .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and timm's registry look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's code may raise
        del sys.modules[name]
        line = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"--plugin {path} fails ({type(error).__name__}: {line}); run it by itself to see where"
        ) from error
