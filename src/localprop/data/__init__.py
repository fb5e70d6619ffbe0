"""Images and labels: named datasets and folders, held in memory or streamed from disk.

`load_data` gives a `Data`, whose batches are pure functions of (seed, epoch, batch), so that a run can be
resumed in the middle of an epoch. The files: loading.py (from settings to a dataset), base.py (what
the trainer sees), sources.py (named datasets), folder.py, walk.py and images.py (folders, files of images, an image),
split.py (images that are held out), identity.py (what a dataset is), view.py (how images are prepared for evaluation),
memory.py and streaming.py (where pixels come from), workers.py (processes that decode), augment.py (crops and flips of
whole batches).
"""

from localprop.data.base import Data
from localprop.data.identity import require_same
from localprop.data.loading import FOLDER, folder_identity, load_data, load_evaluated
from localprop.data.sources import named_settings
from localprop.data.view import evaluation_record, read_evaluation

__all__ = [
    "FOLDER",
    "Data",
    "evaluation_record",
    "folder_identity",
    "load_data",
    "load_evaluated",
    "named_settings",
    "read_evaluation",
    "require_same",
]
