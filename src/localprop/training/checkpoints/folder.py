"""Where checkpoints are: `saving` writes them aside, syncs and renames; `loading` checks them by SHA-256.

A checkpoint is a folder of parts, so that every process of a parallel run can write its own:

    step-00001234/
      module-0.safetensors ...   a part: its tensors, and in the header everything else of it as JSON
      manifest.json              step, names of the parts, meta
      SHA256SUMS                 of all of these; `sha256sum --check SHA256SUMS` verifies them too
"""

import hashlib
import re
from pathlib import Path

from localprop.system.reading import require_regular

MANIFEST = "manifest.json"
CHECKSUMS = "SHA256SUMS"
FORMAT = 2
# "step-00001234.old" exists only while a checkpoint of the same step takes its place.
NAME = re.compile(r"step-(\d{8,})(\.old)?")


def checkpoint_names(folder: Path) -> list[str]:
    """Names of the checkpoints in `folder`, valid or not, the newest first."""
    return [path.name for path in newest_first(folder)]


def has_checkpoint(folder: Path) -> bool:
    """Whether there is any checkpoint in `folder`, valid or not: without reading them."""
    return bool(newest_first(folder))


def step_folder(folder: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return folder / f"step-{step:08d}"


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of `folder`, valid or not; of one step, the one being replaced comes second."""
    matches = [match for path in folder.glob("step-*") if (match := NAME.fullmatch(path.name))]
    matches.sort(key=lambda match: (int(match[1]), match[2] is None), reverse=True)
    return [folder / match[0] for match in matches]


def sha256(path: Path) -> str:
    """The SHA-256 of a regular file, in hexadecimal digits."""
    require_regular(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
