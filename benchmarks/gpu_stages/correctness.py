"""What the tests marked gpu check, by name, passed or not."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu_stages.outcomes import FILE
from gpu_stages.running import Run

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"


def check(run: Run) -> None:
    """Runs the tests marked gpu, and sends a row for each as soon as it is over.

    Raises:
        RuntimeError: there are none, or pytest could not run them, or time was up.
    """
    files = gpu_tests(TESTS)
    if not files:
        raise RuntimeError(f"no file in {TESTS} has a test marked gpu")
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder) / "outcomes"
        outcomes.touch()
        path = [str(ROOT / "benchmarks"), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, FILE: str(outcomes), "PYTHONPATH": os.pathsep.join(filter(None, path))}
        words = ["-p", "gpu_stages.outcomes", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *words, *map(str, files)]
        log = Path(folder) / "log"
        with log.open("w") as output:
            process = subprocess.Popen(command, cwd=TESTS.parent, env=environment, stdout=output, stderr=output)
            try:
                _follow(run, process, outcomes)
            finally:
                _end(process)
        if process.returncode not in (0, 1):  # 1: a test has failed, which its row says
            last = (log.read_text().strip().splitlines() or ["no output"])[-1]
            raise RuntimeError(f"pytest ended with exit code {process.returncode}: {last[:200]}")


def gpu_tests(folder: Path) -> list[Path]:
    """The files that have tests marked gpu: only these are imported."""
    return sorted(path for path in folder.rglob("test_*.py") if "mark.gpu" in path.read_text())


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends the tests, if they are not over: they would disturb the next stage."""
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _follow(run: Run, process: "subprocess.Popen[bytes]", outcomes: Path) -> None:
    """Sends rows while the tests run.

    Raises:
        RuntimeError: time was up before they were over.
    """
    with outcomes.open() as lines:
        over = False
        while not over:
            over = process.poll() is not None  # before reading, so that the last lines are read, too
            for line in lines:
                row = json.loads(line)
                run.send(row.pop("name"), row)
            if run.left < 0 and not over:
                raise RuntimeError("time was up before all tests were over")
            time.sleep(0 if over else 0.2)
