"""The processes that train together: how they find each other, talk beside the pipeline, and end."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from localprop.errors import ParallelError, first_line
from localprop.memory.measure import is_out_of_memory
from localprop.parallel.agreement import difference
from localprop.parallel.forms import bytes_of_json, json_of_bytes
from localprop.parallel.loopback import loopback_interface
from localprop.system.launched import job_folder

# Of a process that hangs without being gone; a slow epoch between two messages must fit in.
_PATIENCE = timedelta(hours=2)
_START = timedelta(minutes=30)  # until the last process has been started and has imported torch


class Lost(ParallelError):
    """Another process is gone; why, only whoever started it knows."""


def in_job() -> bool:
    """Whether `launch`, or torchrun, started this process as one of several."""
    names = ("RANK", "WORLD_SIZE", *(() if job_folder() else ("MASTER_ADDR", "MASTER_PORT")))
    return all(name in os.environ for name in names)


class Job:
    """The processes of a run, and this one's place among them.

    Attributes:
        rank: this process's number, from 0.
        size: number of processes.
        attempt: how often torchrun has started the processes again after a failure.
        name: of torchrun's job, the same in every attempt; None where torchrun did not start it.
        device: what this process trains on.
    """

    def __init__(self, rank: int, size: int, store: dist.Store, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        self.name = None if job_folder() else os.environ.get("TORCHELASTIC_RUN_ID", "none")
        self._store = store
        self._control: dist.ProcessGroup | None = None

    def agree(self, facts: dict[str, Any]) -> None:
        """Returns when all processes have told the same facts, before they talk in any other way.

        Args:
            facts: names, as a message gives them, and values that JSON has.

        Raises:
            ParallelError: they differ, or a process tells nothing.
        """
        self._store.set(f"facts of {self.rank}", json.dumps(facts))
        if self.rank == 0:
            everyone = [json.loads(self._told(f"facts of {rank}", rank)) for rank in range(self.size)]
            self._store.set("difference", difference(everyone) or "")
        if line := self._told("difference", 0).decode():
            raise ParallelError(line)

    def _told(self, key: str, rank: int) -> bytes:
        try:
            self._store.wait([key], _START)
            return self._store.get(key)
        except RuntimeError as error:
            raise ParallelError(
                f"rank {rank} does not tell its settings ({_first_line(error)}); start all processes at the same "
                "time, with one version of localprop"
            ) from None

    def connect(self) -> None:
        """Opens the connections to the other processes.

        Raises:
            ParallelError: they are not reached.
        """
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        try:
            group = dist.PrefixStore("group", self._store)
            dist.init_process_group(backend, store=group, rank=self.rank, world_size=self.size, timeout=_PATIENCE)
            # Small things, from CPU to CPU, which need not come in the order of the stream of features.
            control = dist.new_group(backend="gloo", timeout=_PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise ParallelError(f"the processes do not find each other ({_first_line(error)})") from None
        assert isinstance(control, dist.ProcessGroup)  # of which this process is part
        self._control = control

    @contextmanager
    def talking(self, to: str = "another process") -> Iterator[None]:
        """Turns what torch.distributed raises when the other side is gone into `Lost`."""
        try:
            yield
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise Lost(f"{to} is gone ({_first_line(error)}); it was killed, or its machine is gone") from error

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every process, by rank; of what JSON has, in which tuples become lists."""
        own = bytes_of_json(value)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with self.talking():
            dist.all_gather(sizes, torch.tensor([own.numel()]), group=self._control)
        texts = [torch.zeros(int(max(sizes)), dtype=torch.uint8) for _ in sizes]
        texts[self.rank][: own.numel()] = own
        with self.talking():
            dist.all_gather(texts, texts[self.rank].clone(), group=self._control)
        return [json_of_bytes(text[: int(size)]) for text, size in zip(texts, sizes, strict=True)]

    def wait_for_all(self) -> None:
        """Returns when every process has come here."""
        with self.talking():
            dist.barrier(group=self._control)

    def send(self, tensor: Tensor, rank: int) -> None:
        """Sends a tensor beside the pipeline; waits until it is taken."""
        with self.talking(f"rank {rank}"):
            dist.send(tensor.detach().cpu().contiguous(), rank, group=self._control)

    def receive(self, like: Tensor, rank: int) -> Tensor:
        """Receives a tensor of shape and type of `like`, on the CPU."""
        tensor = torch.empty(like.shape, dtype=like.dtype)
        with self.talking(f"rank {rank}"):
            dist.recv(tensor, rank, group=self._control)
        return tensor

    def ask_to_stop(self, signal: int) -> None:
        """Tells the first process of a signal that came to this one."""
        with self.talking("the launcher"):
            self._store.set("stop", str(signal))

    def asked_to_stop(self) -> int:
        """The number of the signal that some process told of; 0 for none."""
        with self.talking("the launcher"):
            return int(self._store.get("stop")) if self._store.check(["stop"]) else 0

    def first_to_fail(self) -> bool:
        """Whether no other process has said yet that it fails: a job that ends has one cause."""
        try:
            return self._store.add("failed", 1) == 1
        except RuntimeError:  # the launcher is gone, and the store with it
            return False

    def leave(self) -> None:
        """Ends the group, when every process has come here."""
        self.wait_for_all()
        dist.destroy_process_group()


def takes_gpu(device: str | None, local: int) -> bool:
    """Whether a process has a GPU of its own; `device` as of `join`, `local` its number on this machine, from 0.

    Raises:
        ParallelError: it should, and there are not so many; or `device` is another.
    """
    if device not in (None, "cpu", "cuda"):
        raise ParallelError(f"--device {device} is one device; with --parallel say cpu or cuda: each process takes one")
    count = torch.cuda.device_count()
    cuda = device == "cuda" or (device is None and count > 0)
    if cuda and local >= count:
        raise ParallelError(
            f"process {local + 1} on this machine has no GPU, there are {count}; start fewer, or add --device cpu"
        )
    return cuda


def meet(device: str | None) -> Job:
    """Finds the place where the other processes are met; `Job.connect` connects to them.

    Args:
        device: "cpu", "cuda" or None for cuda if there is one: each process of a machine takes one of its GPUs.

    Raises:
        ParallelError: there are more processes on this machine than GPUs, the variables that number them are not set,
            or the place is not found.
    """
    unset = "" if job_folder() else "0"  # what is missing under torchrun, torch says
    if not all(os.environ.get(name, unset).isdecimal() for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")):
        raise ParallelError("RANK, LOCAL_RANK and WORLD_SIZE must be set, to whole numbers")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = takes_gpu(device, local)
    place = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(place)
    try:
        store, rank, size = _meet_here() if job_folder() else next(iter(dist.rendezvous("env://", timeout=_START)))
    except (RuntimeError, ValueError) as error:
        raise ParallelError(f"the processes do not find each other ({_first_line(error)})") from None
    # Another attempt must not meet what the one before left.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Job(rank, size, dist.PrefixStore(f"localprop-{attempt}", store), place)


def _meet_here() -> tuple[dist.Store, int, int]:
    """Meets processes of this machine alone: nothing listens where another machine could connect."""
    name, folder = loopback_interface(), job_folder()
    # "=": NCCL takes the start of a name otherwise.
    os.environ |= {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}
    size = int(os.environ["WORLD_SIZE"])
    return dist.FileStore(f"{folder}/store", size), int(os.environ["RANK"]), size


def join(device: str | None) -> Job:
    """Meets the other processes and connects to them; see `meet`."""
    job = meet(device)
    job.connect()
    return job


def _first_line(error: BaseException) -> str:
    # gloo begins with the place in its own code, and adds guesses.
    return re.sub(r"^\[\S+:\d+\] ", "", first_line(error)).partition(". This is typically")[0][:200]
