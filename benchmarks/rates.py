"""Measures how fast a CPU computes what a training step is made of: the rates in `localprop.memory.speed`.

python benchmarks/rates.py           one thread, steps of Swin-Tiny and ViT-S at batch 8, fp32 and bf16: about 3 minutes

Every operation of a step, below autograd, is timed by the processor time of its thread, with its floating point
operations and the bytes that it reads and writes, as a simulated step counts them. A rate is the sum of the one over
the sum of the other, of all operations of a kind. Operations that are shorter than a tenth of a millisecond are left
out: calling them takes a part of that. Writes benchmarks/results/rates_cpu.json.
"""

import os
import time
from collections import defaultdict
from typing import Any

import torch
from clock import SWIN, VIT, Group, built
from common import write_result
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from localprop.memory.speed import product
from localprop.memory.tracker import work

SHORTEST = 1e-4
STEPS = 3


class Timed(TorchDispatchMode):
    """Adds up, by the name of a rate, the work and the seconds of the operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.work: dict[str, float] = defaultdict(float)
        self.seconds: dict[str, float] = defaultdict(float)
        self.left_out = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operation."""
        kwargs = kwargs or {}
        began = time.thread_time()
        result = func(*args, **kwargs)
        took = time.thread_time() - began
        outputs = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        found = None if func.is_view else work(func, args, kwargs, result, outputs)
        if found is None or took < SHORTEST:
            self.left_out += took
            return result
        name = ".".join(product(func, found.inputs)) if found.flops else "bandwidth"
        self.work[name] += found.flops or found.moved
        self.seconds[name] += took
        return result


def measured(group: Group) -> dict[str, Any]:
    """The rates of steps of end-to-end training."""
    step, timed = built(group, {"modules": 1}), Timed()
    step()
    for _ in range(STEPS):
        with timed:
            step()
    return {
        "model": group.model,
        "batch_size": group.batch_size,
        "amp": group.amp,
        "left_out": round(timed.left_out, 4),
        "work": dict(timed.work),
        "seconds": {name: round(seconds, 4) for name, seconds in timed.seconds.items()},
        "rates": {name: timed.work[name] / seconds for name, seconds in timed.seconds.items()},
    }


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for amp in (False, True):
        for model in (SWIN, VIT):
            rows.append(measured(Group(model, 8, amp)))
            for name, rate in sorted(rows[-1]["rates"].items()):
                print(f"{model:30s} {amp!s:6s} {name:20s} {rate:.3g} {rows[-1]['seconds'][name]:.2f} s", flush=True)
    names = sorted({name for row in rows for name in row["rates"]})
    rates = {
        name: sum(row["work"].get(name, 0.0) for row in rows) / sum(row["seconds"].get(name, 0.0) for row in rows)
        for name in names
    }
    write_result("rates_cpu", {"load": os.getloadavg(), "steps": STEPS, "rates": rates, "rows": rows})


if __name__ == "__main__":
    main()
