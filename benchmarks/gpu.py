"""Measures localprop on a GPU, within nine minutes: correctness, memory, time, throughput.

python benchmarks/gpu.py                      all stages, the most important first; writes benchmarks/results/gpu.json
python benchmarks/gpu.py --only large small   only stages whose names begin with one of these words
python benchmarks/gpu.py --dry-run            tries the code of all stages on a CPU, with tiny sizes; measures nothing
python benchmarks/gpu.py --report FILE        prints the tables of a file of results, in Markdown

The file is written again after each row, so a run that is killed loses nothing. Each stage has a process and a time
limit of its own. If one fails, a line says why, and the next begins. `prediction` runs on the CPU during the others.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # whoever asks for CUDA does not start it before a fork

import torch
from gpu_stages import correctness, large_images, resuming, small_images, streams, tables
from gpu_stages.results import Results, about_machine
from gpu_stages.running import Stage, run_here, run_stages

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
STAGES = [
    Stage("prediction", large_images.predict, 0, "memory, predicted on the CPU", processes=4),
    Stage("correctness", correctness.check, 26, "the tests marked gpu"),
    *(
        Stage(f"large-{case}-{mode}", partial(large_images.measure, number, mode), share, f"224 px, {case}, {mode}")
        for number, case, mode, share in (
            (0, "swin-bf16", "graphs", 9),
            (0, "swin-bf16", "eager", 9),
            (1, "vit-bf16", "graphs", 8),
            (1, "vit-bf16", "eager", 8),
        )
    ),
    *(
        Stage(f"small-{method.lower()}", partial(small_images.measure, method), 9, f"32 px, localprop train, {method}")
        for method in ("K=4", "end-to-end")
    ),
    Stage("resume", resuming.compare, 12, "resumed equals uninterrupted, each decoder"),
    *(
        Stage(f"large-swin-fp32-{mode}", partial(large_images.measure, 2, mode), 4, f"224 px, Swin, fp32, {mode}")
        for mode in ("graphs", "eager")
    ),
    Stage("streams", streams.race, 3, "two modules on two streams"),
    Stage("compiled", large_images.measure_compiled, 20, "224 px, torch.compile"),
]


def main() -> int:
    """Returns the exit code: 0, 1 where a stage failed, 2 for a wrong command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file to write (default: benchmarks/results/gpu.json)")
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit of all stages together (default: 9)")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help=f"of {', '.join(stage.name for stage in STAGES)}")
    parser.add_argument("--dry-run", action="store_true", help="try the code on a CPU with tiny sizes")
    parser.add_argument("--commit", help="the commit to note if this is no git checkout")
    parser.add_argument("--report", type=Path, metavar="FILE", help="print the tables of a file of results")
    options = parser.parse_args()
    if options.report:
        try:
            text = tables.report(json.loads(options.report.read_text()))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
            print(f"gpu: {options.report} is no file of results ({reason}); name another", file=sys.stderr)
            return 2
        print(text)
        return 0
    stages = [stage for stage in STAGES if not options.only or stage.name.startswith(tuple(options.only))]
    problem = None
    if not stages:
        problem = f"no stage is called {' or '.join(options.only)}; choose from {', '.join(s.name for s in STAGES)}"
    elif options.dry_run and options.out and RESULTS in options.out.resolve().parents:
        problem = f"a dry run is no result; name a file outside of {RESULTS.relative_to(ROOT)}"
    elif not 0 < options.minutes < math.inf:
        problem = f"--minutes is {options.minutes:g}; it must be above 0"
    elif options.out and (options.out.is_dir() or not options.out.parent.is_dir()):
        problem = f"--out is {options.out}; it must be a file in a folder that exists"
    about = None if problem else _about(options.dry_run, options.commit)
    if about is None:
        problem = problem or "there is no CUDA device; --dry-run tries the code on a CPU"
    if problem:
        print(f"gpu: {problem}", file=sys.stderr)
        return 2
    default = Path(tempfile.gettempdir()) / "gpu-dry-run.json" if options.dry_run else RESULTS / "gpu.json"
    results = Results(options.out or default, about)
    print(f"writing {results.path}", flush=True)
    if options.dry_run:
        run_here(stages, results, 60 * options.minutes)
    else:
        run_stages(stages, results, torch.device("cuda"), 60 * options.minutes)
    return summarize(results.content)


def _about(dry: bool, commit: str | None) -> dict[str, Any] | None:
    """What the results are made with; None where there is no CUDA. A process of its own looks: this one starts none."""
    if dry:
        return about_machine("cpu", True, commit)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def look() -> None:
        theirs.send(about_machine("cuda", False, commit) if torch.cuda.is_available() else None)

    process = context.Process(target=look)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        return None
    finally:
        process.join()


def summarize(content: dict[str, Any]) -> int:
    """Prints a line for each stage; gives 1 where one failed, else 0."""
    failed = False
    for name, stage in content["stages"].items():
        bad = [row for row in stage["rows"] if row.get("error") or row.get("outcome") == "failed"]
        words = stage["error"] or ("ok" if stage["finished"] else "not finished")
        failed = failed or bool(stage["error"] or bad)
        print(f"{name:24s} {stage.get('seconds', 0):6.1f} s  {len(stage['rows']):3d} rows, {len(bad)} failed  {words}")
        for row in bad:
            print(f"  {row['name']}: {row.get('error') or row.get('why')}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
