"""Images and labels: named datasets and folders, held in memory or streamed from disk.

`load_data` gives a `Data`, whose batches are pure functions of (seed, epoch, batch), so that a run can be
resumed in the middle of an epoch. The files: loading.py (from settings to a dataset), base.py (what
the trainer sees), sources.py (named datasets), split.py (images that are held out), identity.py (what a dataset is),
view.py (how images are prepared for evaluation), transfer.py (brings batches to a GPU without a wait). In images/:
folder.py, walk.py and reading.py (folders, files of images, an image), decoding.py (small images into memory),
memory.py and streaming.py (where pixels come from), workers.py (processes that decode), augment.py (crops and flips of
whole batches).
"""
