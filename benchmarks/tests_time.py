"""Measures the README's two test commands: wall-clock time, and processor time of all their processes.

python benchmarks/tests_time.py [--json FILE]
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import localprop

ROOT = Path(__file__).parents[1]
COMMANDS = (("pytest",), ("pytest", "-m", "processes"))


def main() -> None:
    """Runs both commands, prints their numbers, and writes them to a file if one is named.

    Exits with the code of the first command that fails.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    options = parser.parse_args()
    numbers = [timed(words) for words in COMMANDS]
    print(f"\n{'command':<20} {'minutes':>8} {'processor minutes':>18}   {os.cpu_count()} cores")
    for row in numbers:
        print(f"{row['command']:<20} {row['seconds'] / 60:>8.1f} {row['processor_seconds'] / 60:>18.1f}   {row['end']}")
    if options.json:
        options.json.write_text(json.dumps({"tests": numbers, "made with": localprop.provenance()}, indent=1) + "\n")


def timed(words: tuple[str, ...]) -> dict[str, Any]:
    """Runs a command in the root of the checkout; returns its seconds, processor seconds and last line."""
    started, before = time.monotonic(), processor_seconds()
    with subprocess.Popen([sys.executable, "-m", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        line = ""
        for line in process.stdout or ():
            print(line, end="", flush=True)
    if process.returncode:
        sys.exit(process.returncode)
    return {
        "command": " ".join(words),
        "seconds": time.monotonic() - started,
        "processor_seconds": processor_seconds() - before,
        "end": line.strip(),
    }


def processor_seconds() -> float:
    """User and system time of all child processes that have ended and were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
