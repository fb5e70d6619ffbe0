"""The Hugging Face Hub: whether what is wanted of it can be had, found out in seconds."""

import socket
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import huggingface_hub
import torch
from huggingface_hub import constants

from localprop.errors import ConfigError, first_line

_SECONDS = 5
_PORTS = {"http": 80, "https": 443}


def require_reachable(what: str, repository: str | None, files: Sequence[str], url: str | None = None) -> None:
    """Finds out whether weights can be had, before a client tries it for a minute.

    Args:
        what: is wanted, for the message.
        repository: on the Hub, with `@revision` or without; None for weights at `url`.
        files: of which one in the Hub's cache will do.
        url: where they are otherwise.

    Raises:
        ConfigError: they are not in a cache, and their place cannot be reached.
    """
    if repository is not None:
        name, _, revision = repository.partition("@")
        if any(_cached(name, file, revision or None) for file in files):
            return
        url = constants.ENDPOINT
    elif url is None or (Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(url).path).name).exists():
        return
    if problem := _unreachable(url):
        raise ConfigError(f"{what} cannot be had ({problem}); name weights that you have: --initial-checkpoint FILE")


def _cached(name: str, file: str, revision: str | None) -> bool:
    try:
        return isinstance(huggingface_hub.try_to_load_from_cache(name, file, revision=revision), str)
    except ValueError:  # no name of a repository: the client says so
        return False


def _unreachable(url: str) -> str | None:
    """Why the host of an address, or the proxy before it, does not answer; None where it does."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    parts = urlsplit(url)
    host = parts.hostname or ""
    proxy = urlsplit(getproxies().get(parts.scheme, ""))
    end = proxy if proxy.hostname else parts
    try:
        socket.create_connection((end.hostname or host, end.port or _PORTS.get(end.scheme, 443)), _SECONDS).close()
    except OSError as error:
        return f"{end.hostname or host} cannot be reached: {error.strerror or first_line(error)}"
    return None
