"""Measures how long images take: a folder of small ones until all are in memory, and a batch of them.

python benchmarks/data.py FOLDER               a folder as --data folder:FOLDER takes it; 60,000 images take a minute
python benchmarks/data.py FOLDER --name NAME   writes results/NAME.json, such as of another commit on PYTHONPATH

The folder is opened with and without processes that decode, three times each in turn. For comparison it measures the
least that a cache of decoded pixels would need: listing the folder, to see whether it has changed, and reading the
pixels from one file. A batch is cropped, flipped, normalised and mixed, with one thread and with two. Other work on the
machine ("load") adds to wall-clock time, and hardly to processor time. Writes results/data.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from common import write_result

# In a process of its own, to measure the time of the processes that it starts.
OPEN = """
import json, resource, sys, time
from localprop.data.loading import load_data
from localprop.settings.config import DataConfig
started = time.perf_counter()
data = load_data(DataConfig(data="folder:" + sys.argv[1], workers=int(sys.argv[2])), None, 0)
wall = time.perf_counter() - started
used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(json.dumps({"wall": wall, "cpu": sum(u.ru_utime + u.ru_stime for u in used), "images": data.train_size}))
"""
CACHED = """
import json, sys, tempfile, time
from pathlib import Path
import numpy as np
from localprop.data.images.folder import list_folder
with tempfile.TemporaryDirectory() as folder:
    np.save(folder + "/pixels.npy", np.ones((int(sys.argv[2]), 3, 32, 32), np.uint8))
    started = time.perf_counter()
    found = list_folder(Path(sys.argv[1]))
    listed = time.perf_counter()
    np.load(folder + "/pixels.npy")
    print(json.dumps({"list": listed - started, "read": time.perf_counter() - listed}))
"""
BATCHES = """
import json, statistics, sys, time
import torch
from localprop.data.loading import load_data
from localprop.settings.config import DataConfig
torch.set_num_threads(int(sys.argv[1]))
config = DataConfig(data="synthetic", crop_pad=4, mixup=float(sys.argv[2]), cutmix=float(sys.argv[3]))
data = load_data(config, None, 0)
walls, times = [], []
for epoch in range(30):
    batches = data.train_batches(epoch, 512, "cpu")
    while True:
        started, used = time.perf_counter(), time.process_time()
        if next(batches, None) is None:
            break
        walls.append(time.perf_counter() - started)
        times.append(time.process_time() - used)
found = {"wall": statistics.median(walls), "wall, least": min(walls), "cpu": statistics.median(times)}
print(json.dumps({name: 1000 * value for name, value in found.items()}))
"""
MIXES = {"crop, flip": (0, 0), "crop, flip, mixup": (0.8, 0), "crop, flip, cutmix": (0, 1)}


def measure(code: str, *arguments: object) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", default="data")
    options = parser.parse_args()
    opened: dict[str, list[dict[str, float]]] = {"--workers 0": [], "--workers 2": []}
    for _ in range(3):
        for name, runs in opened.items():
            runs.append(measure(OPEN, options.folder, name.split()[1]))
    images = int(opened["--workers 0"][0]["images"])
    rows = {
        name: {key: round(statistics.median(run[key] for run in runs), 2) for key in ("wall", "cpu")}
        for name, runs in opened.items()
    }
    cached = {key: round(value, 2) for key, value in measure(CACHED, options.folder, images).items()}
    batches = {
        f"{name}, {threads} threads": {key: round(value, 2) for key, value in measure(BATCHES, threads, *mix).items()}
        for threads in (1, 2)
        for name, mix in MIXES.items()
    }
    result = {"training_images": images, "load": os.getloadavg(), "seconds": rows, "least_seconds_of_a_cache": cached}
    for name, row in [*rows.items(), ("a cache, at least", cached), *batches.items()]:
        print(f"{name:32s}", row)
    write_result(options.name, result | {"milliseconds_of_a_batch_of_512": batches})


if __name__ == "__main__":
    main()
