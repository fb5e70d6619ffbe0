"""Simulates more processes than this machine has: local modules, 1F1B, zero-bubble and data parallel.

python benchmarks/parallel_table.py     the network of parallel.py on 4 and 8 ranks, four speeds of the links: 2 minutes

Times of modules and units are measured one after the other, in one process with one thread. parallel.json has the error
of such a simulation for two ranks. Local modules wait for the slowest module only; the pipelines also wait for
micro-batches. 1F1B sends as torch.distributed.pipelining does, zero-bubble (ZB-H1) while it computes, and data parallel
during backward. Writes benchmarks/results/parallel_table.json.
"""

import argparse
from itertools import pairwise

import torch
from common import write_result
from small_swin import MODEL, add_flags, backbone, cut_evenly, joined, localized, time_modules, time_units

from localprop.parallel.placement import IN_FLIGHT
from localprop.planning.schedules import Link, StageTime, Timing, data_parallel, local_modules, one_f_one_b, zero_bubble

# Bytes per second, and seconds of latency.
LINKS = {
    "1 Gbit/s": Link(1.25e8, 1e-4),
    "10 Gbit/s": Link(1.25e9, 5e-5),
    "100 Gbit/s": Link(1.25e10, 1e-5),
    "free": Link(),
}
RANKS = (4, 8)
# The cuts make times even, inside a block if need be. Like the others, these modules compute nothing twice.
LOCAL = {"split_blocks": True, "recompute": False}


def stages_of(units: list[StageTime], ranks: int, micro_batches: int) -> list[StageTime]:
    """The stages of a pipeline, from the times of its units for one micro-batch."""
    ends = cut_evenly(units, ranks)
    return [joined(units[i:j], micro_batches) for i, j in pairwise([0, *ends])]


def describe(timing: Timing, alone: float) -> dict:
    return vars(timing) | {"speedup": alone / timing.seconds}


def main() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dry-run", action="store_true", help="print, and write no result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    batch, network = options.batch_size, (options.embed_dim, options.depths)
    modules = {
        ranks: time_modules(localized(backbone(*network), ranks, batch // ranks, **LOCAL), batch, ranks, options.rounds)
        for ranks in RANKS
    }  # in as many micro-batches as there are ranks
    # One micro-batch for each rank, and four. In data parallel a rank's part of a batch is as large as the former.
    sizes = sorted({batch, *(batch // (n * m) for n in RANKS for m in (1, 4))})
    units = {size: time_units(backbone(*network), size, options.rounds) for size in sizes}
    alone = sum(unit.seconds for unit in units[batch])
    print(f"end-to-end in one process: {alone:.3f} s per batch; below: how many times as fast")
    rows = []
    for ranks in RANKS:
        few, many = (stages_of(units[batch // (ranks * m)], ranks, ranks * m) for m in (1, 4))
        for name, link in LINKS.items():
            results = {
                "local": local_modules(modules[ranks], link, IN_FLIGHT),
                f"1F1B, {ranks} micro-batches": one_f_one_b(few, link, ranks),
                f"1F1B, {4 * ranks} micro-batches": one_f_one_b(many, link, 4 * ranks),
                f"zero-bubble, {ranks} micro-batches": zero_bubble(few, link, ranks),
                f"zero-bubble, {4 * ranks} micro-batches": zero_bubble(many, link, 4 * ranks),
                "data parallel": data_parallel(units[batch // ranks], ranks, link),
            }
            for schedule, timing in results.items():
                rows.append({"ranks": ranks, "link": name, "schedule": schedule} | describe(timing, alone))
            shown = "  ".join(f"{schedule} {alone / timing.seconds:.2f}" for schedule, timing in results.items())
            print(f"{ranks} ranks, {name}: {shown}", flush=True)
    measured = {
        "end_to_end_seconds": alone,
        "modules": {n: [vars(stage) for stage in own] for n, own in modules.items()},
        "units": {size: [vars(stage) for stage in own] for size, own in units.items()},
        "links": {name: {"bandwidth": own.bandwidth, "latency": own.latency} for name, own in LINKS.items()},
    }
    measured["links"]["free"]["bandwidth"] = None  # JSON has no infinity
    if not options.dry_run:
        settings = {key: value for key, value in vars(options).items() if key != "dry_run"}
        write_result("parallel_table", settings | {"model": MODEL, "local": LOCAL, "rows": rows, "measured": measured})


if __name__ == "__main__":
    main()
