"""Compares local modules in two processes with one process, and with 1F1B of torch.distributed.pipelining.

python benchmarks/parallel.py             a small Swin, 32 px, batch 128, K=2, gloo, one thread per process: 6 minutes
python benchmarks/parallel.py --reach 1   heads that read ahead, in one process and in two, and no 1F1B: 4 minutes

Needs two cores that do nothing else. Rounds are interleaved. Each round trains (a) `localprop train` in one process,
(b) the same with `--parallel modules` in two, and (c) the same backbone end-to-end by 1F1B, with its two stages cut
where measured times are most even. All three divide a batch into the same number of micro-batches. None computes
activations twice, unless you pass --recompute, which is the default of local modules. Only steps in the steady state
count; the data are random images. By the kernel's account, a process waits when its main thread neither computes nor is
ready to.

The script also measures memory, from the allocator's events. It compares the measured times with a simulation, whose
times are measured while both processes compute and do not communicate. Writes benchmarks/results/parallel.json; with
--reach, benchmarks/results/parallel_reach.json.
"""

import argparse
import csv
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import ROOT, write_result
from parallel_ranks import cpu_seconds, resident
from PIL import Image
from small_swin import CLASSES, MODEL, SIDE, add_flags, backbone, cut_evenly, model_kwargs, time_units

import localprop
from localprop.parallel.placement import IN_FLIGHT
from localprop.planning.schedules import Link, StageTime, local_modules, one_f_one_b

WARM = 6  # steps: memory is measured in one of them, and the pipeline has to fill
PATIENCE = 300  # seconds


def write_images(folder: Path, count: int) -> None:
    """Writes a folder of random images: a few images under many names."""
    generator = torch.Generator().manual_seed(0)
    for split, number in (("train", count), ("test", CLASSES)):
        for label in range(CLASSES):
            (folder / split / str(label)).mkdir(parents=True)
            first = folder / split / str(label) / "0.png"
            pixels = torch.randint(256, (SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(first)
            for i in range(1, -(-number // CLASSES)):
                os.link(first, first.with_name(f"{i}.png"))


def environment(rank: int, job: str | None) -> dict[str, str]:
    """Environment of a process: one thread, and the folder in which it meets the other process, if there is one."""
    own = dict(os.environ, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", TORCH_CPP_LOG_LEVEL="ERROR")
    if job:
        own |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCALPROP_JOB": job}
    return own


def start(command: list[str], ranks: int, log: Path) -> list[subprocess.Popen]:
    """Starts a command once, or as two ranks as `--nproc` does."""
    job = tempfile.mkdtemp(dir=log.parent) if ranks > 1 else None
    with log.open("a") as file:
        return [
            subprocess.Popen([sys.executable, *command], env=environment(rank, job), stdout=file, stderr=file)
            for rank in range(ranks)
        ]


def end(processes: list[subprocess.Popen], log: Path, codes: tuple[int, ...] = (0,)) -> None:
    """Waits for processes; exits with their output if they fail."""
    try:
        ended = [process.wait(PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(code not in codes for code in ended):
        sys.exit(f"exit codes {ended}:\n{log.read_text()[-4000:]}")


def train(options: argparse.Namespace, folder: Path, ranks: int) -> dict[str, Any]:
    """Seconds per step of `localprop train` with two modules, and the share of time that each rank waits."""
    run, log = folder / "runs" / "one", folder / "log"
    shutil.rmtree(folder / "runs", ignore_errors=True)
    flags = [f"{key}={value}" for key, value in model_kwargs(options.embed_dim, options.depths).items()]
    command = [
        *["-m", "localprop", "train", "--data", f"folder:{folder / 'images'}", "--img-size", str(SIDE)],
        *["--model", MODEL, "--model-kwargs", *flags, "--method", "feature-reconstruction", "--modules", "2"],
        *["--partition", "compute", "--batch-size", str(options.batch_size), "--epochs", "1", "--device", "cpu"],
        *["--micro-batches", str(options.micro_batches), "--recompute", str(options.recompute)],
        *["--reach", str(options.reach)],
        *["--output", str(folder / "runs"), "--experiment", "one"],
        *(["--parallel", "modules"] if ranks > 1 else []),
    ]
    processes = start(command, ranks, log)
    moments = [_when(processes, run / "losses.csv", step, log) for step in (WARM, WARM + options.steps)]
    memory = [resident(process.pid) for process in processes]
    with (run / "losses.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if WARM < int(row["step"]) <= WARM + options.steps]
    for process in processes:
        process.send_signal(signal.SIGTERM)
    end(processes, log, codes=(0, 143))
    passed = moments[1][0] - moments[0][0]
    return {
        "seconds": statistics.mean(float(row["seconds_per_step"]) for row in rows),
        "waiting": [1 - (b - a) / passed for a, b in zip(moments[0][1], moments[1][1], strict=True)],
        "resident": memory,
    }


def _when(processes: list[subprocess.Popen], losses: Path, step: int, log: Path) -> tuple[float, list[float]]:
    """When a run reaches a step, and how long each process has computed until then; both in seconds."""
    limit = time.monotonic() + PATIENCE
    while time.monotonic() < limit and all(process.poll() is None for process in processes):
        if losses.exists() and _last_step(losses) >= step:
            return time.perf_counter(), [cpu_seconds(process.pid) for process in processes]
        time.sleep(0.02)
    for process in processes:
        process.kill()
    sys.exit(f"training did not come to step {step}:\n{log.read_text()[-4000:]}")


def _last_step(losses: Path) -> int:
    first_cell = losses.read_text().splitlines()[-1].partition(",")[0]
    return int(first_cell) if first_cell.isdigit() else 0


def ranks_do(task: str, folder: Path, **options: Any) -> list[dict[str, Any]]:
    """The results of the two ranks; see parallel_ranks.py."""
    arguments = json.dumps(options | {"output": str(folder)})
    script = str(ROOT / "benchmarks" / "parallel_ranks.py")
    end(start([script, task, arguments], 2, folder / "log"), folder / "log")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def predict(probe: list[dict[str, Any]], measured: dict[str, float], micro_batches: int) -> dict[str, Any]:
    """Simulated seconds per step, beside the measured ones."""
    link = Link(**probe[0]["link"])
    timings = {
        "local": local_modules([StageTime(**own["local"]) for own in probe], link, IN_FLIGHT),
        "1F1B": one_f_one_b([StageTime(**own["pipeline"]) for own in probe], link, micro_batches),
    }
    return {
        name: vars(timing) | {"error_percent": round(100 * (timing.seconds / measured[name] - 1), 2)}
        for name, timing in timings.items()
    }


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, and medians of the ratios within rounds."""
    seconds = {name: statistics.median(own[name]["seconds"] for own in rounds) for name in rounds[0]}
    ratio = {
        f"local against {other}": statistics.median(own[other]["seconds"] / own["local"]["seconds"] for own in rounds)
        for other in seconds
        if other != "local"
    }
    waiting = {
        name: [statistics.median(own[name]["waiting"][rank] for own in rounds) for rank in range(2)]
        for name in seconds
        if name != "one process"
    }
    # The slower rank is the one that waits less.
    return {"seconds": seconds, "ratio": ratio, "waiting": waiting, "waiting of the slower rank": min(waiting["local"])}


def read_ahead(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Two processes against one, with heads that read ahead; and what `localprop plan` expects."""
    rounds = []
    for _ in range(options.rounds):
        rounds.append({"one process": train(options, folder, 1), "local": train(options, folder, 2)})
        print({name: round(own["seconds"], 3) for name, own in rounds[-1].items()}, flush=True)
    planned = localprop.plan(
        backbone(options.embed_dim, options.depths), options.batch_size, modules=(2,), partition="compute",
        method="feature-reconstruction", reach=options.reach, recompute=options.recompute,
        micro_batches=options.micro_batches, nproc=2,
    )  # fmt: skip
    row = next(row for row in planned.rows if row.parallel)
    expected = {"ratio": row.step.seconds / row.parallel.timing.seconds, "waiting": row.parallel.timing.waiting}
    return summary(rounds) | {"planned": expected, "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--recompute", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--reach", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--probe-seconds", type=float, default=8)
    parser.add_argument("--dry-run", action="store_true", help="print, and write no result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "images", min(100, 2 * WARM + options.steps + 8) * options.batch_size)
        if options.reach:
            result = read_ahead(options, folder)
            print(json.dumps(result, indent=1))
            if not options.dry_run:
                settings = {key: value for key, value in vars(options).items() if key != "dry_run"}
                write_result("parallel_reach", settings | {"model": MODEL} | result)
            return
        units = time_units(
            backbone(options.embed_dim, options.depths), options.batch_size // options.micro_batches, rounds=3
        )
        common = {
            "batch_size": options.batch_size, "embed_dim": options.embed_dim, "depths": options.depths,
            "cut": cut_evenly(units, 2)[0], "micro_batches": options.micro_batches,
            "local": {"recompute": options.recompute},
        }  # fmt: skip
        rounds = []
        for _ in range(options.rounds):
            ranks = ranks_do("time_pipeline", folder, steps=options.steps, **common)
            pipeline = {name: [own[name] for own in ranks] for name in ("waiting", "resident")}
            pipeline["seconds"] = max(own["seconds"] for own in ranks)
            rounds.append(
                {"one process": train(options, folder, 1), "local": train(options, folder, 2), "1F1B": pipeline}
            )
            print({name: round(own["seconds"], 3) for name, own in rounds[-1].items()}, flush=True)
        probe = ranks_do("probe", folder, seconds=options.probe_seconds, **common)
        memory = ranks_do("memory", folder, **common)
    result = summary(rounds)
    result["prediction"] = predict(probe, result["seconds"], options.micro_batches)
    result["memory"] = {
        "local": [own["local"] for own in memory],
        "1F1B": [own["pipeline"] for own in memory],
        "ratio of the largest": max(own["local"] for own in memory) / max(own["pipeline"] for own in memory),
        "parts": memory,
    }
    print(json.dumps(result, indent=1))
    if not options.dry_run:
        settings = {key: value for key, value in vars(options).items() if key != "dry_run"}
        write_result("parallel", settings | {"model": MODEL} | common | result | {"rounds": rounds, "probe": probe})


if __name__ == "__main__":
    main()
