"""Trains alike in one process, in two and by torchrun, on real images: the weights must be the same, bit for bit.

python benchmarks/parallel_exact.py --data folder:PATH     a small Swin at 32 px, K=2, one epoch of CIFAR-10: 10 minutes

PATH holds CIFAR-10 as train/ and test/ with a folder per class. The fourth run has two agents of torchrun that find
each other by a rendezvous, as two machines would; they share this machine's address. Each process has one thread and
communicates by gloo. While torchrun runs, its store listens on all interfaces. Writes
benchmarks/results/parallel_exact.json.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import free_port, write_result

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
LOCALPROP = ["-m", "localprop", "train"]
FLAGS = [
    *["--model-kwargs", "patch_size=4", "window_size=4", "embed_dim=32", "depths=(1,1)", "num_heads=(2,4)"],
    *["--modules", "2", "--partition", "compute", "--min-depth", "0", "--batch-size", "128", "--device", "cpu"],
    *["--drop-path", "0.1", "--mixup", "0.2", "--clip-grad", "1", "--model-ema", "--model-ema-decay", "0.99"],
]


def layouts() -> dict[str, list[list[str]]]:
    """The commands of each layout, which start at the same time, without the flags that all share."""
    meet = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "exact"]
    meet += ["--rdzv-endpoint", f"localhost:{free_port()}", "--local-addr", "localhost"]
    modules = ["--parallel", "modules"]
    return {
        "one process": [[sys.executable, *LOCALPROP]],
        "--parallel modules --nproc 2": [[sys.executable, *LOCALPROP, *modules, "--nproc", "2"]],
        "torchrun --nproc-per-node 2": [[*TORCHRUN, "--nproc-per-node", "2", *LOCALPROP, *modules]],
        "two agents of torchrun": [[*TORCHRUN, *meet, *LOCALPROP, *modules] for _ in range(2)],
    }


def train(commands: list[list[str]], flags: list[str], output: Path) -> dict[str, Any]:
    """Trains, and returns the result; exits with the output of a run that fails."""
    more = [*FLAGS, *flags, "--output", str(output), "--experiment", "run"]
    environment = dict(os.environ, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    logs = [output / f"{i}.log" for i in range(len(commands))]
    processes = []
    for command, log in zip(commands, logs, strict=True):
        with log.open("w") as file:
            processes.append(subprocess.Popen([*command, *more], env=environment, stdout=file, stderr=file))
    codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit("\n".join(log.read_text()[-3000:] for log in logs))
    run = output / "run"
    *_, last = (run / "results.csv").read_text().splitlines()
    names = (run / "results.csv").read_text().splitlines()[0].split(",")
    row = dict(zip(names, last.split(","), strict=True))
    weights = hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()
    same = {name: value for name, value in row.items() if name.startswith(("train_loss", "test_"))}
    return {"weights_sha256": weights, "seconds": float(row["seconds"]), "results": same}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--dry-run", action="store_true", help="print, and write no result")
    options = parser.parse_args()
    flags, found = ["--data", options.data, "--img-size", "32", "--epochs", str(options.epochs)], {}
    for name, commands in layouts().items():
        folder = Path(tempfile.mkdtemp())
        found[name] = train(commands, flags, folder)
        shutil.rmtree(folder)
        print(name, found[name], flush=True)
    first, *others = found.values()
    same = all((own["weights_sha256"], own["results"]) == (first["weights_sha256"], first["results"]) for own in others)
    print("the same, bit for bit" if same else "NOT the same")
    if not options.dry_run:
        data = Path(options.data.removeprefix("folder:")).name
        write_result("parallel_exact", {"data": data, "flags": FLAGS, "epochs": options.epochs, "same": same} | found)


if __name__ == "__main__":
    main()
