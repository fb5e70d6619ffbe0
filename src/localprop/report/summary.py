"""What is shown when a run is over."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from localprop.registry import MODELS
from localprop.report.formats import format_bytes, format_duration, format_loss, format_speed
from localprop.report.results import EpochRow
from localprop.system.commands import command, plugin_words


def final_table(
    rows: Sequence[EpochRow], module_names: Sequence[str], evaluated_on: str = "test", reserved: int | None = None
) -> RenderableType:
    """What came out: a line per module, then the network's scores, speed, memory and time.

    Args:
        rows: one or more epochs.
        module_names: the units of each module, such as "patch_embed ... blocks.2".
        evaluated_on: "test" or "validation" images.
        reserved: bytes that PyTorch has held on a GPU at most, in use or not.
    """
    last = rows[-1]
    headline, *others = last.measures
    best = max(rows, key=lambda row: headline.rank(row.headline))
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("module", justify="right")
    table.add_column("units", overflow="fold")
    table.add_column("loss", justify="right", no_wrap=True)
    table.add_column(f"{evaluated_on} {headline.sign or headline.short}", justify="right", no_wrap=True)
    modules = zip(module_names, last.train_losses, last.heads, strict=True)
    for k, (name, loss, score) in enumerate(modules, 1):
        style = "bold" if k == len(module_names) else None
        table.add_row(str(k), Text(name), format_loss(loss), headline.text(score), style=style)
    speed = sum(row.examples_per_second for row in rows) / len(rows)
    ends = [f"{headline.text(row.headline)}{headline.sign}" for row in (last, best)]
    scores = [f"{ends[0]}, best {ends[1]} (epoch {best.epoch})"]
    for measure, value in zip(others, last.network[1:], strict=True):
        scores += [] if value is None else [f"{measure.name} {measure.text(value)}{measure.sign}"]
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_row(f"{evaluated_on} {headline.name}", ", ".join(scores))
    facts.add_row("speed", format_speed(speed, last.unit))
    facts.add_row("peak memory", _memory(rows, reserved))
    facts.add_row("time", format_duration(last.seconds))
    return Group(table, facts)


def _memory(rows: Sequence[EpochRow], reserved: int | None) -> str:
    measured, predicted = rows[-1].peak_memory, rows[-1].predicted_memory  # of all epochs in the last one's layout
    words = [f"{format_bytes(measured)} measured"] if measured else []
    words += [f"{format_bytes(predicted)} predicted"] if predicted else []
    words += [f"{format_bytes(reserved)} reserved"] if reserved else []
    return ", ".join(words) or "-"


def next_steps(
    run_folder: Path,
    weights: Path,
    model_name: str,
    model_kwargs: Mapping[str, Any],
    plugin: Path | None = None,
    task: str | None = None,
    trained: bool = False,
) -> str:
    """What to do with a finished run, as lines to copy; print them unwrapped with `console.out`.

    Args:
        run_folder: where the run was written to.
        weights: the backbone's weights, in safetensors.
        model_name: name of the model.
        model_kwargs: everything else that is needed to build the same network, such as num_classes.
        plugin: the file that the run's settings name, if they name one.
        task: what the network is trained for, where that is not the default.
        trained: whether it started from trained weights: then its own may be trained further.
    """
    arguments = [f"{key}={value!r}" for key, value in model_kwargs.items()]
    if model_name in MODELS:
        where, package, build = "once your plugin is imported", "localprop", f"localprop.MODELS[{model_name!r}]"
    else:
        where, package, build = "without localprop", "timm", "timm.create_model"
        arguments.insert(0, repr(model_name))
    call = f"model = {build}({', '.join(arguments)})"
    if len(call) > 80:
        call = "\n".join([f"model = {build}(", *(f"    {argument}," for argument in arguments), ")"])
    task_words = ["--task", task] if task else []
    start = ["--initial-checkpoint", run_folder] if trained else ["--model", model_name]
    return f"""
Evaluate it:

{command("eval", run_folder, *plugin_words(plugin))}

Use it in Python, {where}:

import {package}
from safetensors.torch import load_file

{call}
model.load_state_dict(load_file({str(weights)!r}))

Train {"it further" if trained else "on your own images"} (PATH has train/ and test/, with a folder per class):

{command("train", "--data", "folder:PATH", *start, *task_words, *plugin_words(plugin))}
"""
