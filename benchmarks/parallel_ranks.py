"""Runs as one of two processes that benchmarks/parallel.py starts: `parallel_ranks.py TASK JSON`."""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
from measuring import peak_of, prime
from small_swin import arriving, backbone, batch_of, local_step, localized, optimizer_of
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import localprop
from localprop.network.carry import Carry
from localprop.parallel.placement import IN_FLIGHT
from localprop.planning.schedules import one_f_one_b_order

WARM = 3


class Units(nn.Module):
    """Consecutive units of a backbone as a module that holds their weights only."""

    def __init__(self, model: nn.Module, units: list[localprop.Unit]) -> None:
        super().__init__()
        self._model, self._units = (model,), units
        self._names = [name for unit in units for name in unit.parameters]

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True):
        yield from ((prefix + name, self._model[0].get_parameter(name)) for name in self._names)

    def no_weight_decay(self) -> set[str]:
        return self._model[0].no_weight_decay()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        context: dict = {}
        for unit in self._units:
            features = unit(self._model[0], features, context)
        return features


class Rank:
    """One process: its number, and its stage of the backbone."""

    def __init__(
        self, batch_size: int, embed_dim: int, depths: list[int], cut: int, micro_batches: int, local: dict, **_
    ) -> None:
        self.rank, self.batch_size, self.micro_batches, self.local = dist.get_rank(), batch_size, micro_batches, local
        self.last = self.rank == dist.get_world_size() - 1
        self.model = backbone(embed_dim, depths)
        units = list(localprop.chain(self.model, (3, 32, 32)))
        self.stage = Units(self.model, units[:cut] if self.rank == 0 else units[cut:])
        # The other process's part is not kept here.
        own = set(self.stage._names)
        self.others = [name for name, _ in self.model.named_parameters() if name not in own]

    def pipeline(self) -> tuple[Callable[[], None], list[torch.Tensor]]:
        """A step by 1F1B of torch.distributed.pipelining, with the weights and buffers of this stage."""
        stage = PipelineStage(self.stage, self.rank, dist.get_world_size(), torch.device("cpu"))
        schedule = Schedule1F1B(stage, self.micro_batches, loss_fn=F.cross_entropy)
        optimizer = optimizer_of(self.stage)

        def step() -> None:
            images, labels = batch_of(self.batch_size)
            if self.rank == 0:
                del labels
                schedule.step(images, return_outputs=False)
            else:
                del images
                schedule.step(target=labels, losses=[], return_outputs=False)
            optimizer.step()
            optimizer.zero_grad()

        return step, [*self.stage.parameters(), *self.model.buffers()]

    def time_pipeline(self, steps: int, **_) -> dict:
        """Seconds per step by 1F1B, and the share of time in which this process waited."""
        step, _ = self.pipeline()
        for _ in range(WARM):
            step()
        began, before = time.perf_counter(), cpu_seconds(os.getpid())
        for _ in range(steps):
            step()
        seconds, busy = time.perf_counter() - began, cpu_seconds(os.getpid()) - before
        return {"seconds": seconds / steps, "waiting": 1 - busy / seconds, "resident": resident(os.getpid())}

    def memory(self, **_) -> dict:
        """Peak memory of a step of 1F1B, and of a step of the local module with the batches in flight."""
        gone = [self.model.get_parameter(name) for name in self.others]
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step, kept = self.pipeline()
            for _ in range(WARM):
                step()
        assert not {id(p) for p in gone} & {id(p) for p in kept}
        events = profiler.profiler.kineto_results.events()
        # It includes buffers that torch makes once and keeps, and the optimizer's state.
        highest = max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
        result = {"pipeline": sum(t.nbytes for t in kept) + highest}
        del step
        net, optimizer, arrive = self._local_module()
        module = net.local_modules[self.rank]
        kept = [*module.parameters(), *module.local_loss.buffers(), *self.model.buffers(), *prime([optimizer])]
        carry = arrive()
        came = carry.features.nbytes + carry.targets.nbytes if self.rank else 0
        del carry
        sent = []

        def once() -> None:
            # The first process loads batches, and divides them into copies.
            whole = batch_of(self.batch_size) if self.rank == 0 and self.micro_batches > 1 else None
            sent.append(local_step(net, self.rank, optimizer, arrive, self.micro_batches))
            del whole

        result["local step"] = peak_of(once, kept, "cpu")
        result["local in flight"] = IN_FLIGHT * (came + (0 if self.last else sent[-1]))
        return result | {"local": result["local step"] + result["local in flight"]}

    def _local_module(self) -> tuple[localprop.LocalNetwork, torch.optim.Optimizer, Callable[[], Carry]]:
        """The local network, the optimizer of this rank's module, and a function that makes its micro-batches."""
        micro = self.batch_size // self.micro_batches
        net = localized(self.model, 2, micro, **self.local)
        return net, optimizer_of(net.local_modules[self.rank]), arriving(net, self.rank, micro)

    def probe(self, seconds: float, **_) -> dict:
        """What a simulation needs: times of this rank's parts while the other computes, and the link's speed."""
        net, optimizer, arrive = self._local_module()
        size = 0

        def local() -> dict[str, float]:
            nonlocal size
            began = time.perf_counter()
            size = local_step(net, self.rank, optimizer, arrive, self.micro_batches)
            return {"forward": time.perf_counter() - began}

        result = {"local": medians(local, seconds), "link": None}
        result["local"]["output"] = self.micro_batches * size
        result["pipeline"] = medians(self._one_by_one(), seconds)
        with torch.no_grad():
            images, _ = batch_of(self.batch_size)
            result["pipeline"]["output"] = self.stage(images).nbytes if self.rank == 0 else 0
        result["link"] = link_speed(self.rank, size)
        return result

    def _one_by_one(self) -> Callable[[], dict[str, float]]:
        """Forward and backward passes of this stage in 1F1B's order, without the other stage."""
        optimizer = optimizer_of(self.stage)
        images, labels = batch_of(self.batch_size // self.micro_batches)
        source = images
        if self.rank:
            units = list(localprop.chain(self.model, (3, 32, 32)))
            with torch.no_grad():
                source = Units(self.model, units[: len(units) - len(self.stage._units)])(images)

        def step() -> dict[str, float]:
            took, outputs = {"forward": 0.0, "backward": 0.0}, []
            for kind, _ in one_f_one_b_order(self.rank, dist.get_world_size(), self.micro_batches):
                began = time.perf_counter()
                if kind == "F":
                    output = self.stage(source.clone().requires_grad_(self.rank > 0))
                    outputs.append(F.cross_entropy(output, labels) if self.last else output)
                else:
                    output = outputs.pop(0)
                    output.backward(None if self.last else torch.ones_like(output))
                took["forward" if kind == "F" else "backward"] += time.perf_counter() - began
            began = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad()
            return took | {"update": time.perf_counter() - began}

        return step


def medians(measure: Callable[[], dict[str, float]], seconds: float) -> dict[str, float]:
    """Repeats a measurement while the other process does the same, and returns the medians."""
    measure()
    dist.barrier()
    began, found = time.perf_counter(), []
    while len(found) < 3 or time.perf_counter() - began < seconds:
        found.append(measure())
    result = {name: statistics.median(own[name] for own in found) for name in found[0]}
    dist.barrier()
    return result


def link_speed(rank: int, size: int, rounds: int = 20) -> dict[str, float]:
    """Bandwidth (bytes per second) and latency (seconds) between the processes, for messages of about `size` bytes."""
    there = torch.tensor([8, max(size, 1 << 20)])
    dist.broadcast(there, 0)
    times = []
    for count in there.tolist():
        message, own = torch.zeros(count, dtype=torch.uint8), []
        for _ in range(rounds):
            dist.barrier()
            began = time.perf_counter()
            for source in (0, 1):  # there and back
                (dist.send if rank == source else dist.recv)(message, 1 - rank)
            own.append((time.perf_counter() - began) / 2)
        times.append(statistics.median(own))
    return {"latency": times[0], "bandwidth": int(there[1]) / max(times[1] - times[0], 1e-9)}


def cpu_seconds(process: int) -> float:
    """Seconds in which the main thread of a process did not wait: it computed, or was ready to and had no core."""
    computing, queued, _ = Path(f"/proc/{process}/task/{process}/schedstat").read_text().split()
    return (int(computing) + int(queued)) / 1e9


def resident(process: int) -> int:
    """Bytes of the largest resident set of a process so far, with libraries."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    task, options = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(os.path.join(os.environ["LOCALPROP_JOB"], "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    result = getattr(Rank(**options), task)(**options)
    Path(options["output"], f"{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
