"""Commands as a person types them: what messages print can be pasted into a shell."""

import shlex
from pathlib import Path


def command(*words: str | Path) -> str:
    """A localprop command, each word quoted where a shell needs that."""
    return shlex.join(["localprop", *map(str, words)])


def resume_command(folder: Path, plugin: Path | None = None) -> str:
    """The command that resumes a run; `plugin` is the one that its settings name."""
    return command("train", "--resume", folder, *plugin_words(plugin))


def plugin_words(plugin: Path | None) -> list[str]:
    """The flag that names a plugin: a run's own files are not enough to run its code."""
    return ["--plugin", str(plugin)] if plugin else []
