"""Plans of runs with a finish: what its steps take, what fits a budget, and the command that tells it."""

import re
from dataclasses import replace

import pytest
from rich.console import Console

from localprop import localize, plan
from localprop.cli import main
from localprop.planning.planner import Planner
from localprop.planning.reporting import plan_lines, plan_report
from localprop.planning.settings import chosen
from localprop.planning.simulation import simulate_step
from localprop.planning.tables import plan_table
from localprop.report.formats import format_bytes
from localprop.settings.config import LocalConfig, OptimConfig, TrainConfig
from localprop.settings.flat import to_flags
from localprop.settings.plan import PlanConfig
from tiny import CUTS, SIZE, build

OPTIONS = {"method": "greedy", "input_size": SIZE, "cuts": CUTS["vit"][2], "modules": (2,)}


@pytest.fixture(scope="module")
def planned():
    return plan(build("vit"), 16, finish=0.25, **OPTIONS)


def test_a_step_in_the_finish_is_one_of_exact_training_on_the_same_cuts(planned):
    exact = localize(build("vit"), 2, "end-to-end", cuts=CUTS["vit"][2], input_size=SIZE, recompute=True)
    alone = simulate_step(exact, OptimConfig(batch_size=16), 16, SIZE)
    *whole, row = planned.rows
    assert [own.finish for own in whole] == [None, None]
    assert (row.finish.part, row.finish.step.peak, row.finish.step.flops) == (0.25, alone.peak, alone.flops)
    assert row.peak == max(row.step.peak, alone.peak) == planned.memory_ratio(row) * planned.baseline.step.peak
    assert row.seconds == pytest.approx(0.75 * row.step.seconds + 0.25 * alone.seconds)


def test_what_fits_a_budget_fits_in_the_finish_too(planned, monkeypatch):
    """A step of local modules would fit, and one of the finish on the same cuts would not."""
    row, seen = planned.rows[-1], []
    taken = Planner.row
    monkeypatch.setattr(Planner, "row", lambda self, *given: seen.append(taken(self, *given)) or seen[-1])
    low, high = sorted([row.step.peak, row.finish.step.peak])
    assert low < high
    budget = (low + high) // 2
    found = plan(build("vit"), 16, finish=0.25, budget=budget, show="fits", **OPTIONS)
    assert found.choice is found.local_fit
    assert found.local_fit.peak <= budget
    assert any(own.finish and own.peak > budget >= min(own.step.peak, own.finish.step.peak) for own in seen)


def test_the_command_of_a_choice_has_the_finish_of_local_modules_alone(planned):
    config = TrainConfig(local=LocalConfig(method="greedy", finish=0.25), optim=OptimConfig(finish_lr=1e-3))
    exact, local = (" ".join(to_flags(chosen(config, row))) for row in (planned.baseline, planned.rows[-1]))
    assert "--finish" not in exact
    assert "--finish 0.25" in local
    assert "--finish-lr 0.001" in local


def test_it_is_told_beside_the_epochs_before(planned, capsys):
    Console(width=100).print(plan_table(planned, "a title"))
    before, after = re.findall(r"^(?:K=2|  its finish) +(\d+) ", capsys.readouterr().out, re.MULTILINE)
    peaks = [step.peak for step in (planned.rows[-1].step, planned.rows[-1].finish.step)]
    assert [int(before), int(after)] == [round(peak / 2**20) for peak in peaks]
    config = PlanConfig(local=LocalConfig(method="greedy", finish=0.25))
    told = plan_report(config, planned)["rows"][-1]
    assert (told["peak"], told["finish"]["peak"]) == tuple(peaks)
    fits = replace(planned, budget=2**40, exact_fit=planned.baseline, local_fit=planned.rows[-1])
    lines = " ".join(plan_lines(config, fits))
    assert f"K=2 takes {format_bytes(peaks[0])}, in its finish {format_bytes(peaks[1])} and 1." in lines
    assert "what greedy with a finish of 0.25 costs in accuracy has not been measured" in lines


def test_processes_have_no_plan_of_it(capsys):
    assert main(["plan", "--finish", "0.1", "--parallel", "modules", "--nproc", "2"]) == 2
    assert "leave out --finish or --parallel" in capsys.readouterr().err
