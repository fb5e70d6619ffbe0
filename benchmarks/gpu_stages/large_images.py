"""Memory and time of a step at 224 px: predicted, and measured eagerly, as CUDA graphs and compiled."""

from functools import partial

import torch

import localprop
from gpu_stages.cases import Case, cases
from gpu_stages.measuring import Lanes
from gpu_stages.running import Run
from gpu_stages.steps import Mode, build

EAGER_NOTE = "run eagerly: CUDA graphs need CUDA"
ORDER = (
    ("end-to-end", "K=4", "K=4, nothing recomputed", "K=4, a quarter rebuilt", "K=4, reach 1"),
    ("K=8, blocks split", "K=8", "K=2", "K=4, greedy", "K=4, decoder conv"),
    ("exact K=4",),
    ("checkpointing",),
)
_COMPILED = ("end-to-end", "K=4, nothing recomputed")  # the compiler chooses itself what to compute again


def row_name(case: Case, way: str, mode: str) -> str:
    """What a row is called."""
    return f"{case.name}: {way}, {mode}"


def measure(number: int, mode: Mode, run: Run) -> None:
    """Each way to train a case in one mode, in turns.

    A capture that fails may spoil its process; so what matters most is timed before the next is tried.
    """
    case, lanes = cases(run.dry)[number], Lanes(run)
    for ways in ORDER:
        chosen = [way for way in ways if way in case.ways]
        for way in chosen:
            _add(run, lanes, case, way, mode)
        if chosen:
            lanes.in_turns(1 if run.dry else 10)


def measure_compiled(run: Run) -> None:
    """End-to-end and K=4 compiled, in turns with the same uncompiled."""
    for case in cases(run.dry)[:2]:
        lanes = Lanes(run)
        for mode in ("eager", "compiled"):
            for way in _COMPILED:
                if run.dry and mode == "compiled":
                    run.send(row_name(case, way, mode), {"note": "not compiled: it takes a compiler, and a minute"})
                    continue
                _add(run, lanes, case, way, mode)
        lanes.in_turns(1 if run.dry else 10)


def _add(run: Run, lanes: Lanes, case: Case, way: str, mode: Mode) -> None:
    known = {"case": case.name, "model": case.model, "batch": case.batch, "amp": case.amp, "way": way, "mode": mode}
    known["decoder"] = case.ways[way].options.get("decoder", localprop.Recipe.decoder)
    if mode == "graphs" and not run.cuda:
        known["note"] = EAGER_NOTE
    lanes.add(row_name(case, way, mode), partial(build, run, case, case.ways[way], mode), **known)


def predict(run: Run) -> None:
    """Predicts on the CPU what `measure` measures: peak memory with CUDA's kernels."""
    number, count = run.part
    everything = [(case, way) for case in cases(run.dry) for way in case.ways]
    if run.dry:
        everything = everything[:2]  # seconds each, whatever the size
    for case, way in everything[number::count]:
        known = {"case": case.name, "way": way}
        run.attempt(f"{case.name}: {way}", partial(_predicted, case, way), **known)


def _predicted(case: Case, name: str) -> dict[str, int]:
    torch.set_num_threads(1)
    way = case.ways[name]
    options = dict(way.options)
    if way.cuts:
        options["cuts"] = way.cuts
    plan = localprop.plan(
        case.backbone(), case.batch, modules=[len(way.cuts) + 1] if way.cuts else [2], input_size=case.size,
        amp_dtype=case.amp_dtype, device="cuda", **options,
    )  # fmt: skip
    setting = {"ordinary": "end-to-end", "checkpointing": "end-to-end + ckpt"}.get(way.kind)
    row = next(row for row in plan.rows if (row.setting.name == setting if setting else row.setting.modules > 1))
    return {"predicted": row.step.peak}
