"""From what each process recorded to one timeline, on one clock, in the run folder."""

import json
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from localprop.parallel.job import Job
from localprop.parallel.placement import Placement
from localprop.parallel.timeline.picture import draw_timeline
from localprop.parallel.timeline.recording import Lane, Recorder, Span, Timeline
from localprop.system.files import write_text

TRACE = "trace.json"
TIMELINE = "timeline.png"
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_ROUNDS = 20


def recorder_for(job: Job) -> Recorder:
    """A recorder of what this process does."""
    # A GPU still works when the host continues: then the trace would show who asked for work, not who did it.
    cuda = job.device.type == "cuda"
    return Recorder((lambda: torch.cuda.current_stream().synchronize()) if cuda else None)


def write_trace(
    job: Job, placement: Placement, recorder: Recorder, names: Sequence[str], folder: Path, title: str
) -> str | None:
    """Writes RUN/trace.json and RUN/timeline.png; all processes call this together.

    Returns:
        How much each process waited, as a line for the user; None in a process that does not report.
    """
    # Now, not at the start: clocks of two machines drift apart, and the steps recorded are the last ones.
    offset, error = align(job)
    spans = [span._replace(begin=span.begin + offset, end=span.end + offset) for span in recorder.spans]
    gathered = [([Span(*fields) for fields in own], error) for own, error in job.gather((spans, error))]
    if job.rank != placement.reporter:
        return None
    lanes = [Lane(name, sorted(own, key=lambda s: s.begin)) for name, (own, _) in zip(names, gathered, strict=True)]
    timeline = Timeline(lanes, placement.stages[-1].stop, [error for _, error in gathered])
    steps = timeline.steady()
    write_text(folder / TRACE, json.dumps(timeline.as_chrome(title)) + "\n")
    draw_timeline(folder / TIMELINE, timeline, title)
    waited = ", ".join(f"rank {rank} {part:.1%}" for rank, part in enumerate(timeline.waiting(steps)))
    return f"waiting, of the time of {len(steps)} steps: {waited}; see {folder / TIMELINE}, {folder / TRACE}"


def align(job: Job, clock: Callable[[], float] = time.perf_counter, machine: str | None = None) -> tuple[float, float]:
    """How far the clock of rank 0 is ahead of this process's; all processes call this together.

    Processes of one machine read the same clock. Of another machine's, the difference is that between what rank 0's
    clock shows and the middle of a question and its answer, of the round that takes least time.

    Args:
        job: the processes.
        clock: this process's.
        machine: names the machine whose clock it is; found out, if left out.

    Returns:
        The difference in seconds, and how far it may be off: half of that round.
    """
    machines = job.gather(machine or _machine())
    offset, error = 0.0, 0.0
    # Rank 0 answers one after the other.
    for rank in [rank for rank in range(1, job.size) if machines[rank] != machines[0]]:
        if job.rank == 0:
            for _ in range(_ROUNDS):
                job.receive(torch.zeros(1, dtype=torch.float64), rank)
                job.send(torch.tensor([clock()], dtype=torch.float64), rank)
        elif job.rank == rank:
            rounds = [_ask(job, clock) for _ in range(_ROUNDS)]
            error, offset = min(rounds)
    return offset, error


def _ask(job: Job, clock: Callable[[], float]) -> tuple[float, float]:
    begin = clock()
    job.send(torch.zeros(1, dtype=torch.float64), 0)
    answer = job.receive(torch.zeros(1, dtype=torch.float64), 0)
    end = clock()
    return (end - begin) / 2, answer.item() - (begin + end) / 2


def _machine() -> str:
    return _BOOT.read_text().strip() if _BOOT.exists() else socket.gethostname()
