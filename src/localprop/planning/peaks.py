"""Why the peak of a training step is where it is: the layer at work then, and the largest tensors alive."""

import re
from dataclasses import dataclass

from localprop.memory.layers import Layers
from localprop.memory.tracker import Allocation
from localprop.network.network import LocalNetwork
from localprop.planning.simulation import record_step
from localprop.planning.steps import PARTS, Record
from localprop.settings.config import OptimConfig

LARGEST = 10
"""Number of tensors that are told one by one."""
KINDS = 5
"""Number of kinds of layers that are told."""
_SHOWN = ("activations", "temporaries")


@dataclass(frozen=True)
class PeakTensor:
    """A tensor that is alive at the peak.

    Attributes:
        layer: what made it: a module or a unit of the model, under its name there; "auxiliary.*" and "loss" for the
            nets and the rest of the local loss; None for what no layer made, such as the batch.
        shape: its shape; empty for memory that a kernel allocates for itself.
        dtype: its type, such as "float32"; empty likewise.
        use: "activations", if backward needs it, else "temporaries".
        size: bytes.
    """

    layer: str | None
    shape: tuple[int, ...]
    dtype: str
    use: str
    size: int


@dataclass(frozen=True)
class Rest:
    """All other tensors of one use that are alive at the peak.

    Attributes:
        use: as of `PredictedStep.parts`.
        count: how many.
        size: bytes.
    """

    use: str
    count: int
    size: int


@dataclass(frozen=True)
class Kind:
    """Activations and temporaries that layers of one kind made, in all blocks together.

    Attributes:
        layers: their name, with * for numbers, such as "blocks.*.mlp.fc1".
        count: how many tensors.
        size: bytes.
    """

    layers: str
    count: int
    size: int


@dataclass(frozen=True)
class Peak:
    """The moment of a training step at which most memory is in use.

    Attributes:
        setting: the setting of the plan.
        size: bytes in use; the sum of `tensors` and `rest`.
        module: index of the local module at work.
        modules: their number.
        micro_batch: which part of the batch is at work, from 1; None where the batch is not divided.
        micro_batches: their number.
        phase: "forward", "backward", "recomputation" (what runs again in backward), "optimizer step" or "moving
            average".
        layer: what is at work, as of `PeakTensor.layer`; None in the last two phases.
        tensors: the largest activations and temporaries, largest first.
        rest: the others, by use.
        kinds: the kinds of layers that made most, largest first. They are counted among `tensors` and `rest`.
    """

    setting: str
    size: int
    module: int
    modules: int
    micro_batch: int | None
    micro_batches: int
    phase: str
    layer: str | None
    tensors: list[PeakTensor]
    rest: list[Rest]
    kinds: list[Kind]


def explain_peak(
    name: str, net: LocalNetwork, config: OptimConfig, batch_size: int, input_size: tuple[int, int, int], device: str
) -> Peak:
    """Explains the peak of the step that `simulate_step` predicts; `name` is of the setting, the rest as there."""
    record = record_step(net, config, batch_size, input_size, device, layers=Layers())
    alive = record.at_peak()
    shown = sorted((found for found in alive if found[1] in _SHOWN), key=lambda found: -found[0].size)[:LARGEST]
    others = [found for found in alive if found not in shown]
    on_host = record.on_host_at_peak
    rest = []
    for use in PARTS:
        sizes = [allocation.size for allocation, other in others if other == use]
        hidden, bytes_hidden = on_host if use == "optimizer" else (0, 0)
        rest.append(Rest(use, len(sizes) - hidden, sum(sizes) - bytes_hidden))
    newest = max((allocation for allocation, _ in alive), key=lambda allocation: allocation.start)
    return Peak(
        setting=name,
        size=record.in_use[record.moment],
        module=record.module,
        modules=len(record.modules),
        micro_batch=_micro_batch(record),
        micro_batches=record.micro_batches,
        phase=_phase(record, newest),
        layer=newest.layer,
        tensors=[_describe(allocation, use) for allocation, use in shown],
        rest=[group for group in rest if group.count],
        kinds=_kinds([allocation for allocation, use in alive if use in _SHOWN]),
    )


def _describe(allocation: Allocation, use: str) -> PeakTensor:
    dtype = str(allocation.dtype).removeprefix("torch.") if allocation.dtype else ""
    return PeakTensor(allocation.layer, allocation.shape, dtype, use, allocation.size)


def _kinds(allocations: list[Allocation]) -> list[Kind]:
    sizes: dict[str, list[int]] = {}
    for allocation in allocations:
        if allocation.layer:
            sizes.setdefault(re.sub(r"\b\d+\b", "*", allocation.layer), []).append(allocation.size)
    kinds = [Kind(layers, len(own), sum(own)) for layers, own in sizes.items()]
    return sorted(kinds, key=lambda kind: -kind.size)[:KINDS]


def _micro_batch(record: Record) -> int | None:
    """Which micro-batch is at work at the peak: the last, or the first of those that a middle one stands for."""
    if record.micro_batches == 1:
        return None
    if record.turn >= len(record.order):
        return record.micro_batches
    return min(record.micro_batches - 1, 2)


def _phase(record: Record, newest: Allocation) -> str:
    """What happens at the peak, at which the `newest` allocation was made."""
    if record.moment >= record.marks[-1].event:
        return "moving average"
    if record.tracker.events[record.moment].backward:
        return "recomputation" if newest.forward else "backward"
    return "optimizer step" if record.backward_after(record.moment) is None else "forward"
