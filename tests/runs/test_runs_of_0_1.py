"""A run folder made by version 0.1 (commit ba3b577, torch 2.14) resumes, evaluates and exports ever after.

`fixtures/run-0.1` is as SIGTERM left it at step 30 of 66; `fixtures/run-0.1-finished` is what 0.1 made of it.
"""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from localprop.cli import main
from localprop.report.losses import read_losses
from localprop.report.results import read_results
from places import FIXTURES

FINISHED = FIXTURES / "run-0.1-finished"


@pytest.fixture
def run(tmp_path):
    return Path(shutil.copytree(FIXTURES / "run-0.1", tmp_path / "run"))


def test_it_goes_on_to_what_version_0_1_came_to(run, capsys):
    assert main(["train", "--resume", str(run)]) == 0
    assert "was made by version 0.1: whether its images are still the same" in " ".join(capsys.readouterr().out.split())
    # Not bit for bit: processors and versions of torch round otherwise.
    expected, weights = (load_file(folder / "model.safetensors") for folder in (FINISHED, run))
    torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-4)
    rows, old = (read_results(folder / "results.csv") for folder in (run, FINISHED))
    assert [row.step for row in rows] == [row.step for row in old]
    assert rows[-1].score("loss") == pytest.approx(old[-1].score("loss"), rel=1e-3)
    losses, old_losses = (read_losses(folder / "losses.csv") for folder in (run, FINISHED))
    assert [row[0] for row in losses] == [row[0] for row in old_losses]
    assert losses[-1][3:] == pytest.approx(old_losses[-1][3:], rel=1e-3)


def test_it_is_evaluated_from_its_checkpoint(run, capsys):
    assert main(["eval", str(run), "--device", "cpu"]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert said.err.endswith("was made by version 0.1: its images are squeezed in evaluation, as they were then\n")
    assert result["weights"].endswith("step-00000030")
    assert result["top1"] == pytest.approx(45.278, abs=0.6)  # two images of 360
    assert result["loss"] == pytest.approx(1.9668, rel=1e-3)


def test_it_is_exported_for_timm(run, tmp_path):
    assert main(["export", str(run), "--output", str(tmp_path / "export")]) == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True)
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 10)
