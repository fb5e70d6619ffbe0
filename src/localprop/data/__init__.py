"""Images and labels: named datasets and folders, held in memory or streamed from disk.

`load_data` gives a `Data`, whose batches are pure functions of (seed, epoch, batch), so that a run can be
resumed in the middle of an epoch. The files: loading.py (from settings to a dataset), base.py (what
the trainer sees), sources.py (named datasets), folder.py, walk.py and images.py (folders, files of images, an image),
identity.py (what a dataset is), memory.py and streaming.py (where pixels come from), augment.py
(crops and flips of whole batches).
"""

from localprop.data.base import Data
from localprop.data.identity import require_same
from localprop.data.loading import folder_identity, load_data
from localprop.data.sources import named_settings

__all__ = ["Data", "folder_identity", "load_data", "named_settings", "require_same"]
