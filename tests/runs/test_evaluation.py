"""What a run is evaluated with is what its export says: timm alone comes to the same accuracy."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.nn import functional as F

from localprop.cli import main
from localprop.data.loading import load_data
from localprop.report.results import read_results
from localprop.settings.config import DataConfig

CLASSES = ["bottom", "left", "right", "top"]
# A real model whose pretrained weights want images squeezed, without a crop, bicubic: made very small.
MODEL = ["--model", "convnextv2_huge", "--model-kwargs", "depths=(1,1,1,1)", "dims=(8,8,8,8)"]
FLAGS = [*MODEL, "--modules", "2", "--batch-size", "4", "--epochs", "1", "--device", "cpu", "--img-size", "32"]
SIZES = {
    "small and square": [(24, 24)],
    "small": [(40, 20), (16, 33), (32, 32), (90, 30)],
    "large, and one small": [(200, 100), (97, 160), (120, 120), (40, 20)],
}


def draw(root: Path, sizes: list[tuple[int, int]]) -> Path:
    """Noise that is brightest along one edge, where a crop does not look and a squeeze does."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 4), ("test", 8)):
        for name in CLASSES:
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                width, height = sizes[number % len(sizes)]
                pixels = rng.integers(0, 100, (height, width, 3), dtype=np.uint8)
                edge = {"bottom": np.s_[-3:], "top": np.s_[:3], "left": np.s_[:, :3], "right": np.s_[:, -3:]}[name]
                pixels[edge] += 150
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
    return root


def scores_by_timm(export: Path, test: Path) -> tuple[float, float]:
    """Accuracy in percent, and mean loss."""
    model = timm.create_model(f"local-dir:{export}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    paths = sorted(test.glob("*/*"))
    labels = torch.tensor([CLASSES.index(path.parent.name) for path in paths])
    with torch.no_grad():
        logits = model(torch.stack([transform(Image.open(path).convert("RGB")) for path in paths]))
    return 100 * (logits.argmax(1) == labels).float().mean().item(), F.cross_entropy(logits, labels).item()


@pytest.fixture(scope="module", params=SIZES)
def trained(request, tmp_path_factory):
    """A finished run, its images and its export."""
    place = tmp_path_factory.mktemp("trained")
    data = draw(place / "edges", SIZES[request.param])
    flags = ["--data", f"folder:{data}", "--output", str(place), "--experiment", "run", "--workers", "0"]
    assert main(["train", *FLAGS, *flags]) == 0
    assert main(["export", str(place / "run"), "--output", str(place / "export")]) == 0
    return place


def evaluated(capsys, *flags: str) -> dict:
    capsys.readouterr()
    assert main(["eval", *flags, "--device", "cpu"]) == 0
    return json.loads(capsys.readouterr().out)


def test_an_export_gives_with_timm_the_accuracy_that_was_reported(trained, capsys):
    accuracy, loss = scores_by_timm(trained / "export", trained / "edges" / "test")
    row = read_results(trained / "run" / "results.csv")[-1]
    result = evaluated(capsys, str(trained / "run"))
    assert result["top1"] == pytest.approx(accuracy, abs=1e-3)
    assert row.headline == pytest.approx(accuracy)
    assert result["loss"] == pytest.approx(loss, abs=2e-5)
    assert row.score("loss") == pytest.approx(loss, abs=2e-5)
    config = json.loads((trained / "export" / "config.json").read_text())["pretrained_cfg"]
    recorded = json.loads((trained / "run" / "run.json").read_text())["evaluation"]
    assert {key: config[key] for key in recorded} == recorded
    assert not {"test_input_size", "test_crop_pct"} & set(config)


def test_other_data_are_evaluated_as_the_run_recorded(trained, tmp_path, capsys):
    for name, sizes in SIZES.items():
        data = draw(tmp_path / name, sizes)
        accuracy, loss = scores_by_timm(trained / "export", data / "test")
        result = evaluated(capsys, str(trained / "run"), "--data", f"folder:{data}")
        assert (result["top1"], result["loss"]) == (pytest.approx(accuracy, abs=1e-3), pytest.approx(loss, abs=2e-5))


DAMAGE = [
    *(("input_size", value) for value in (None, [], [3, 32], [3, 32, 16], [1, 32, 32], [3, 0, 0], [3, 1.5, 1.5])),
    *(("input_size", value) for value in ([3, True, True], [3, 64, 64], "332")),
    *((key, value) for key in ("mean", "std") for value in (None, [0.5], ["a", "b", "c"], [math.nan] * 3, 0.5)),
    *(("std", [0.5, 0.5, 0]), ("interpolation", "sinc"), ("interpolation", []), ("crop_mode", "wide")),
    *(("crop_pct", value) for value in (0, -1, 1.5, math.nan, "1", None)),
]


@pytest.mark.parametrize(("key", "value"), DAMAGE)
def test_a_damaged_record_is_refused(key, value):
    data = load_data(DataConfig(), 32, 0)
    assert data.evaluated_as(data.evaluation).evaluation == data.evaluation
    with pytest.raises(ValueError, match=key):
        data.evaluated_as({**data.evaluation, key: value})
    for record in (None, [], 5):
        with pytest.raises(ValueError, match="no mapping"):
            data.evaluated_as(record)


def test_a_damaged_record_is_one_line_and_adds_nothing_to_an_export(trained, tmp_path, capsys):
    run = Path(shutil.copytree(trained / "run", tmp_path / "run"))
    description = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(description | {"evaluation": {"input_size": "large"}}))
    for command in (["eval", str(run)], ["export", str(run)], ["train", "--resume", str(run)]):
        capsys.readouterr()
        assert main(command) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert "damaged in what it says of evaluation: input_size is 'large'" in message
    more = {**description["evaluation"], "url": "https://example.org/weights", "file": "/etc/passwd"}
    (run / "run.json").write_text(json.dumps(description | {"evaluation": more}))
    assert main(["export", str(run), "--output", str(tmp_path / "export")]) == 0
    assert not {"url", "file"} & set(json.loads((tmp_path / "export" / "config.json").read_text())["pretrained_cfg"])


def test_what_is_recorded_decides(trained, tmp_path, capsys):
    """Not what the images would have been evaluated with otherwise: training and export cannot come apart."""
    run = trained / "run" / "run.json"
    before = run.read_text()
    description = json.loads(before)
    description["evaluation"] |= {"crop_mode": "border", "crop_pct": 0.8, "interpolation": "nearest", "std": [0.1] * 3}
    try:
        run.write_text(json.dumps(description))
        assert main(["export", str(trained / "run"), "--output", str(tmp_path / "export")]) == 0
        accuracy, loss = scores_by_timm(tmp_path / "export", trained / "edges" / "test")
        result = evaluated(capsys, str(trained / "run"))
        assert (result["top1"], result["loss"]) == (pytest.approx(accuracy, abs=1e-3), pytest.approx(loss, rel=1e-4))
    finally:
        run.write_text(before)
