"""Libraries that are not installed with localprop, but by one of its extras: `pip install 'localprop[lora]'`."""

import importlib
import logging
from types import ModuleType

from localprop.errors import ConfigError, first_line


def import_extra(name: str, extra: str, needed_by: str, otherwise: str = "") -> ModuleType:
    """Imports a module of such a library, or says in one line what to install.

    Args:
        name: of the module.
        extra: the extra of localprop that installs it.
        needed_by: what needs it, such as a flag.
        otherwise: what else the user may do, to end the line with.

    Raises:
        ConfigError: it cannot be imported.
    """
    logger = logging.getLogger("torch.utils._pytree")  # to which torchao, where others look for it, gives cause
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        return importlib.import_module(name)
    except Exception as error:  # a library that does not fit another one may raise anything
        library = name.partition(".")[0]
        raise ConfigError(
            f"{needed_by} needs {library} ({first_line(error)}); pip install 'localprop[{extra}]'{otherwise}"
        ) from None
    finally:
        logger.setLevel(level)
