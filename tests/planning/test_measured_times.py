"""Times predicted for a CPU against those that were measured on one: benchmarks/results/clock_cpu.json."""

import json
from functools import cache

import pytest
import timm

from localprop import localize
from localprop.planning.simulation import simulate_step
from localprop.settings.config import OptimConfig
from places import ROOT

SWIN, BATCH = "swin_tiny_patch4_window7_224", 8
MEASURED = {
    row["name"]: row["ratio"]
    for row in json.loads((ROOT / "benchmarks" / "results" / "clock_cpu.json").read_text())["rows"]
    if (row["model"], row["batch_size"], row["amp"]) == (SWIN, BATCH, False)
}
SETTINGS = {
    "timm's checkpointing": {"modules": 1, "grad_checkpointing": True},
    "K=4": {"modules": 4},
    "K=8, split": {"modules": 8, "split_blocks": True},
}


@cache
def seconds(modules, **options):
    method = "feature-reconstruction" if modules > 1 else "end-to-end"
    net = localize(timm.create_model(SWIN, num_classes=10), modules, method, batch_size=BATCH, reach=0, **options)
    return simulate_step(net, OptimConfig(batch_size=BATCH), BATCH, (3, 224, 224)).seconds


@pytest.mark.parametrize("name", SETTINGS)
def test_the_predicted_time_is_the_one_measured_on_a_cpu(name):
    """Relative to end-to-end training."""
    error = seconds(**SETTINGS[name]) / seconds(1) / MEASURED[name] - 1
    assert abs(error) < 0.1, f"{error:+.1%}"
