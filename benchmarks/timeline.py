"""Draws when two processes compute, wait and send in a real run: the picture of docs/parallel.md.

python benchmarks/timeline.py     the small Swin of the suite cifar10-small at 32 px, K=2, two processes: a minute

Needs two cores that do nothing else. Writes docs/timeline.png. benchmarks/results/timeline.json gets, from the run's
trace, the share of time that each process waited and the time of a step; timeline_bytes.json the bytes that a step
sends.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import timm
import torch
from common import ROOT, write_result

import localprop

MODEL = {"patch_size": 2, "window_size": 4, "embed_dim": 48, "depths": "(2,2,2,2)", "num_heads": "(3,6,12,24)"}
BATCH = 64
FLAGS = [
    *["--model", "swin_tiny_patch4_window7_224", "--model-kwargs", *(f"{k}={v}" for k, v in MODEL.items())],
    *["--data", "digits", "--img-size", "32", "--batch-size", str(BATCH), "--modules", "2", "--partition", "compute"],
    *["--epochs", "1", "--device", "cpu", "--parallel", "modules", "--nproc", "2", "--reach", "0", "--trace"],
]


def traffic() -> dict[str, int]:
    """Bytes of a step: the features at the cut, and the weights whose gradients data parallel averages."""
    sizes = {"embed_dim": 48, "depths": (2, 2, 2, 2), "num_heads": (3, 6, 12, 24), "patch_size": 2, "window_size": 4}
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, img_size=32, **sizes)
    net = localprop.localize(model, modules=2, partition="compute", reach=0, input_size=(3, 32, 32))
    with torch.no_grad():
        features = net.local_modules[0](torch.zeros(BATCH, 3, 32, 32), {})
    return {"features": features.nbytes, "weights": sum(p.nbytes for p in model.parameters())}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "localprop", "train", *FLAGS, "--output", folder, "--experiment", "run"]
        load = os.getloadavg()[0]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        trace = json.loads(Path(folder, "run", "trace.json").read_text())
        shutil.copyfile(Path(folder, "run", "timeline.png"), ROOT / "docs" / "timeline.png")
    known = trace["otherData"]
    steps = range(*known["steady_steps"])
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X" and event["args"]["step"] in steps]
    compute = [
        round(statistics.median(e["dur"] / 1000 for e in spans if e["cat"] == "compute" and e["tid"] == rank), 2)
        for rank in range(2)
    ]
    result = {"flags": FLAGS, "load_before": round(load, 2), "compute_ms": compute, **known}
    write_result("timeline", result)
    write_result("timeline_bytes", traffic())
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
