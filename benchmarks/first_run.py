"""Runs the README's first command, `localprop train`, as a newcomer does: its accuracy, and how long it takes.

python benchmarks/first_run.py        about two minutes on two cores that do nothing else

Writes benchmarks/results/first_run.json.
"""

import csv
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import write_result


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "localprop", "train"], cwd=folder, check=True)
        seconds = time.perf_counter() - began
        (table,) = Path(folder).glob("runs/*/results.csv")
        with table.open() as file:
            last = list(csv.DictReader(file))[-1]
    own = {"command": "localprop train", "seconds": round(seconds, 1), "training_seconds": float(last["seconds"])}
    write_result("first_run", own | {"accuracy": float(last["test_acc_4"]), "peak_memory": int(last["peak_memory"])})


if __name__ == "__main__":
    main()
