"""What each of several processes takes: local modules shared out to them, or end-to-end training by 1F1B."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from localprop.division.divide import localize
from localprop.division.partition import balanced
from localprop.errors import ParallelError
from localprop.memory.cost import Costs
from localprop.memory.measure import total_bytes
from localprop.memory.part import Conditions
from localprop.network.module import LocalModule
from localprop.network.network import LocalNetwork
from localprop.parallel.placement import IN_FLIGHT, arrange
from localprop.planning.fake_training import fake_training
from localprop.planning.schedules import Link, StageTime, Timing, local_modules, one_f_one_b, one_f_one_b_order
from localprop.planning.simulation import simulate_step
from localprop.planning.steps import PredictedStep
from localprop.settings.bounds import require_equal_parts
from localprop.settings.config import OptimConfig

MICRO_BATCHES = 4


@dataclass(frozen=True)
class Processes:
    """What a way to train takes on several processes.

    Attributes:
        ranks: the local modules, or the stages, of each process; where there are replicas, of the first ones.
        units: names of each process's units.
        peaks: predicted peak memory of each process in bytes, batches in flight included.
        timing: expected seconds per batch, each process's share of waiting, and what is busiest; of meaning only beside
            others.
        micro_batches: into which a batch is divided.
        replicas: processes that train the same modules, on a part of each batch.
    """

    ranks: list[range]
    units: list[list[str]] = field(repr=False)
    peaks: list[int]
    timing: Timing
    micro_batches: int = 1
    replicas: int = 1

    @property
    def largest(self) -> int:
        """The process that takes most memory."""
        return max(range(len(self.peaks)), key=self.peaks.__getitem__)


def share_out(
    net: LocalNetwork,
    step: PredictedStep,
    optim: OptimConfig,
    batch_size: int,
    input_size: tuple[int, int, int],
    device: str,
    processes: int,
    link: Link,
) -> Processes:
    """Local modules in parallel: which process trains which, and what that takes.

    Args:
        net: the network.
        step: its step in one process.
        optim: as of `simulate_step`, and so the next three.
        batch_size: see there.
        input_size: see there.
        device: see there.
        processes: their number.
        link: between two of them.

    Raises:
        ParallelError: there are more processes than modules and not a multiple of them, or the modules are trained
            exactly.
        ConfigError: replicas cannot share the batch out.
        PlanError: memory cannot be predicted.
    """
    if net.exact:
        raise ParallelError("its modules wait for each other, and share one process")
    layout = arrange("modules", len(step.module_seconds), processes, step.module_seconds)
    parts = optim.micro_batches
    require_equal_parts(batch_size, parts, layout.replicas)
    part = batch_size // layout.replicas
    steps = [simulate_step(net, optim, part, input_size, device, modules, layout.replicas) for modules in layout.stages]
    entries = [own.entry for own in steps[1:]]
    stages = [
        StageTime(
            own.seconds - own.ahead - own.behind,
            own.behind,
            output=parts * size,
            gradients=_trained(net, modules),
            ahead=own.ahead,
        )
        for own, size, modules in zip(steps, [*entries, 0], layout.stages, strict=True)
    ]
    waiting = in_flight(net, layout.stages, [own.entry for own in steps])
    return Processes(
        ranks=list(layout.stages),
        units=[[unit for k in modules for unit in net.local_modules[k].units] for modules in layout.stages],
        peaks=[own.peak + entries_waiting for own, entries_waiting in zip(steps, waiting, strict=True)],
        timing=local_modules(stages, link, IN_FLIGHT, layout.replicas, parts),
        micro_batches=parts,
        replicas=layout.replicas,
    )


def in_flight(net: LocalNetwork, stages: Sequence[range], entries: Sequence[int]) -> list[int]:
    """Bytes that each stage holds besides its step: (micro-)batches received ahead, and sent and not known to be taken.

    Args:
        net: the network.
        stages: the modules of each stage.
        entries: of each stage, the bytes of a micro-batch as it comes there; see `PredictedStep.entry`.
    """
    # Where a head reads ahead, what was sent is taken before its step ends, and one more may come.
    shared = [bool(net.local_modules[modules.start].shared) for modules in stages[1:]]
    came = [(1 if own else IN_FLIGHT) * entry for own, entry in zip(shared, entries[1:], strict=True)]
    left = [0 if own else IN_FLIGHT * entry for own, entry in zip(shared, entries[1:], strict=True)]
    return [one + other for one, other in zip([0, *came], [*left, 0], strict=True)]


def _trained(net: LocalNetwork, modules: range) -> int:
    """Bytes of the weights that modules train, and so of their gradients."""
    return total_bytes(p for k in modules for p in net.local_modules[k].parameters() if p.requires_grad)


def pipeline(
    costs: Costs, optim: OptimConfig, batch_size: int, device: str, amp_dtype: torch.dtype | None, processes: int,
    link: Link,
) -> Processes | None:  # fmt: skip
    """End-to-end training by 1F1B: a backbone in stages that take about the same time, and what that takes.

    A batch has as many micro-batches as local modules are to take, by default four; and at least one for each stage. Of
    activations a stage holds only those of micro-batches whose backward is to come.

    Args:
        costs: the backbone's units and what is known of them.
        optim: optimizer, precision, moving average.
        batch_size: images per step.
        device: "cpu" or "cuda": whose kernels and speed to assume.
        amp_dtype: type of mixed precision; None without.
        processes: number of stages.
        link: between two of them.

    Returns:
        None where there are not so many units, or images in a batch.

    Raises:
        PlanError: memory cannot be predicted.
    """
    units, count = costs.chain, max(optim.micro_batches if optim.micro_batches > 1 else MICRO_BATCHES, processes)
    if len(units) < processes or batch_size < count:
        return None
    micro = -(-batch_size // count)
    seconds = [cost.seconds for cost in costs.units(Conditions(micro, amp_dtype, device=device))]
    ends = balanced(len(units), processes, lambda _, start, stop: sum(seconds[start:stop]))
    whole = localize(costs.model, 1, "end-to-end", costs=costs).local_modules[0]
    spans = list(pairwise([0, *ends]))
    net = LocalNetwork(
        costs.model, [LocalModule(costs.model, units[i:j], whole.local_loss, whole.output) for i, j in spans]
    )
    stages, peaks = zip(
        *(_simulate_stage(net, optim, micro, units.input_size, device, rank, count) for rank in range(processes)),
        strict=True,
    )
    return Processes(
        ranks=[range(rank, rank + 1) for rank in range(processes)],
        units=[module.units for module in net.local_modules],
        peaks=list(peaks),
        timing=one_f_one_b(stages, link, count),
        micro_batches=count,
    )


def _simulate_stage(
    net: LocalNetwork,
    optim: OptimConfig,
    micro: int,
    input_size: tuple[int, int, int],
    device: str,
    rank: int,
    micro_batches: int,
) -> tuple[StageTime, int]:
    """Times and peak memory of a stage that does the forward and backward passes of a batch in 1F1B's order."""
    last, size = rank == len(net.local_modules) - 1, 0
    seconds = {"F": 0.0, "B": 0.0}
    with fake_training(net, optim, micro, input_size, device, range(rank, rank + 1)) as (state, tracker, arrive):
        module = state.net.local_modules[rank]
        outputs: deque[Tensor] = deque()
        for kind, _ in one_f_one_b_order(rank, len(net.local_modules), micro_batches):
            began = tracker.seconds
            if kind == "F":
                carry = arrive()
                output = module(carry.features.requires_grad_(rank > 0), carry.context)
                size = total_bytes([output])
                outputs.append(module.local_loss(output, carry.features, None, carry.targets)[0] if last else output)
                del carry, output
            else:
                output = outputs.popleft()
                with torch.autocast("cpu", enabled=False):
                    output.backward(None if last else torch.empty_like(output))
                del output
            seconds[kind] += tracker.seconds - began
        began = tracker.seconds
        state.optimizers[0].step()
        state.optimizers[0].zero_grad(set_to_none=True)
        if state.ema:
            state.ema.update(state.net.backbone)
        update = tracker.seconds - began
    stage = StageTime(seconds["F"], seconds["B"], update=update, output=micro_batches * size)
    return stage, max(tracker.in_use())
