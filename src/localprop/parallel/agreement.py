"""What must be the same in all processes of a job, and the line that tells where they differ."""

import hashlib
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from localprop.errors import shortened
from localprop.settings.config import TrainConfig
from localprop.settings.flat import free, to_flat
from localprop.system.provenance import versions

_PACKAGE = Path(__file__).parent.parent


def facts(config: TrainConfig, resumed: Path | None, device: str) -> dict[str, Any]:
    """What a process has to have in common with the others before anything is loaded.

    Args:
        config: its settings.
        resumed: the folder of the run that is resumed.
        device: the type of its device.

    Returns:
        Names, as a message gives them, and values that JSON has: settings by their flags, versions, and the contents
        of the plugin.
    """
    settings = to_flat(config) | {"resume": str(resumed) if resumed else None}
    if config.data.data.startswith("folder:"):
        settings["data"] = "folder:"  # another path on another machine
    plugin = settings.pop("plugin")
    result: dict[str, Any] = {"the type of --device": device}
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        # The kind of device is compared when it is known, the images when they are loaded.
        if name in free("processes"):
            continue
        if isinstance(value, dict):
            result |= {f"{flag} {key}": item for key, item in value.items()}
        else:
            result[flag] = value
    result["the content of --plugin"] = _digest(Path(plugin).expanduser()) if plugin else None
    result["the code of localprop"] = _digest(*sorted(_PACKAGE.rglob("*.py")))
    python = ".".join(platform.python_version_tuple()[:2])
    for name, version in (versions() | {"Python": python}).items():
        result[f"the version of {name}"] = version and version.partition("+")[0]  # after it: for which CUDA
    return result


def data_facts(identity: dict[str, Any]) -> dict[str, Any]:
    """What a process has to have in common with the others when the data are loaded.

    Args:
        identity: of its data.
    """
    classes = identity["classes"]
    result = {"the source of the data": identity["source"], "the number of classes": len(classes)}
    result |= {f"the name of class {label}": name for label, name in enumerate(classes)}
    result |= {
        f"the number of {name.replace('_', ' ')}": identity[name] for name in ("train_images", "evaluated_images")
    }
    return result | {"the SHA-256 of the images' names and sizes": identity["files"]}


def difference(facts: Sequence[dict[str, Any]]) -> str | None:
    """A line that tells the first fact in which processes differ; None if there is none.

    Args:
        facts: of each process, by rank.
    """
    for name in dict.fromkeys(name for own in facts for name in own):
        ranks: dict[str, list[int]] = {}
        for rank, own in enumerate(facts):
            ranks.setdefault(json.dumps(own.get(name), sort_keys=True), []).append(rank)
        if len(ranks) > 1:
            values = [f"{_described(json.loads(value))} in {_numbers(own)}" for value, own in ranks.items()]
            return f"{name} is {' and '.join(values[:3])}; start all processes with the same settings, code and data"
    return None


def _described(value: Any) -> str:
    if value is None:
        return "not given"
    text = " ".join(value.split()) if isinstance(value, str) else json.dumps(value)
    return shortened(text, 200)


def _numbers(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    spans = f"{ranks[0]} to {ranks[-1]}" if ranks[-1] - ranks[0] == len(ranks) - 1 > 1 else ""
    some = [*map(str, ranks[:5]), *(["..."] if len(ranks) > 5 else [])]
    return f"ranks {spans or ', '.join(some)}"


def _digest(*paths: Path) -> str:
    """The digest of files; 'no file' where one is missing, which loading will report."""
    digest = hashlib.sha256()
    for path in paths:
        if not path.is_file():
            return "no file"
        digest.update(path.read_bytes())
    return f"SHA-256 {digest.hexdigest()[:16]}"
