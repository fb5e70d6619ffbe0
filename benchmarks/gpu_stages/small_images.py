"""Images per second of `localprop train` on small images, and of a bare CUDA graph of the same step."""

import json
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor

import localprop
from gpu_stages.cases import SWIN
from gpu_stages.large_images import EAGER_NOTE
from gpu_stages.running import Run
from gpu_stages.steps import BareGraph, Train, autocast
from gpu_stages.training import register_random_images, spread, throughput, train

DATA = "random-images"
METHODS = {"end-to-end": ["--method", "end-to-end"], "K=4": ["--modules", "4", "--partition", "stage"]}
_EPOCHS = 3


@dataclass(frozen=True)
class _Size:
    """What is trained: Swin-Tiny for 32 px, and the number of images; in a dry run very small."""

    batch: int
    images: int
    kwargs: dict[str, Any]


FULL = _Size(512, 60 * 512, {"patch_size": 2, "window_size": 4, "embed_dim": 96, "num_heads": (3, 6, 12, 24)})
TINY = _Size(4, 8, {"patch_size": 4, "window_size": 2, "embed_dim": 8, "depths": (1,) * 4, "num_heads": (1,) * 4})


def measure(method: str, run: Run) -> None:
    """Training without graphs, a bare graph of the same step, and training as graphs.

    In this order: a capture that fails may spoil its process.
    """
    size = TINY if run.dry else FULL
    register_random_images(DATA, size.images, 32)
    known = {"method": method, "batch": size.batch} | ({} if run.cuda else {"note": EAGER_NOTE})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for row, measured in {
            "localprop train, eager": partial(_trained, run, size, folder, "eager", METHODS[method], "off"),
            "bare graph": partial(_bare, run, size, folder / "eager"),
            "localprop train, graphs": partial(_trained, run, size, folder, "graphs", METHODS[method], "on"),
        }.items():
            run.attempt(f"{method}, {row}", measured, **known)


def _trained(run: Run, size: _Size, folder: Path, name: str, flags: list[str], graphs: str) -> dict[str, Any]:
    kwargs = [f"{key}={str(value).replace(' ', '')}" for key, value in size.kwargs.items()]
    common = [
        *("--data", DATA, "--hold-on-device", "--model", SWIN, "--model-kwargs", *kwargs, "--img-size", "32"),
        *("--batch-size", str(size.batch), "--amp", "--smoothing", "0", "--lr", "1e-4", "--epochs", str(_EPOCHS)),
        *("--val-interval", str(_EPOCHS)),
    ]
    started = time.perf_counter()
    finished = train(run, folder, name, *common, *flags, graphs=graphs)
    return throughput(finished.folder) | {"whole_run_s": round(time.perf_counter() - started, 1)}


def _bare(run: Run, size: _Size, folder: Path) -> dict[str, Any]:
    """The step of a finished run, alone: the same network, losses, optimizers and kernels, and a batch that exists."""
    torch.backends.cudnn.deterministic = run.cuda  # as in a run
    step, batch = bare_step(run, folder, size.batch), _batch(run, size.batch)
    rates = []
    for number in range(1 if run.dry else 8):
        count = 1 if run.dry else 25
        for _ in range(3 if number == 0 else 0):  # warm-up, capture, and a first replay
            step(list(batch))
        _wait(run)
        started = time.perf_counter()
        for _ in range(count):
            step(list(batch))
        _wait(run)
        rates.append(count * size.batch / (time.perf_counter() - started))
    return spread(rates)


def bare_step(run: Run, folder: Path, batch_size: int) -> Train:
    """A training step of the network of a run folder, as one CUDA graph where there is CUDA."""
    record = json.loads((folder / "run.json").read_text())
    recipe = {key: value for key, value in record["recipe"].items() if key not in ("modules", "partition", "cuts")}
    model = timm.create_model(record["model"], **record["model_kwargs"])
    net = localprop.localize(
        model.to(run.device), cuts=[units[-1] for units in record["modules"][:-1]] or None,
        modules=len(record["modules"]), input_size=tuple(record["input_size"]), batch_size=batch_size, **recipe,
    ).to(run.device).train()  # fmt: skip
    assert [module.units for module in net.local_modules] == record["modules"]
    rate = torch.tensor(1e-4, device=run.device) if run.cuda else 1e-4
    options = {"fused": True, "capturable": True} if run.cuda else {"fused": True}
    optimizers = [
        create_optimizer_v2(module, opt="adamw", lr=rate, weight_decay=0.05, **options) for module in net.local_modules
    ]

    def after_module(k: int, loss: Tensor) -> None:
        optimizers[k].step()
        optimizers[k].zero_grad()

    def step(own: list[Tensor]) -> None:
        with autocast(run, True, graphs=run.cuda):
            net.backward(own.pop(0), own.pop(), after_module=after_module)

    return BareGraph(step) if run.cuda else step


def _batch(run: Run, size: int) -> list[Tensor]:
    return [torch.randn(size, 3, 32, 32, device=run.device), torch.randint(0, 10, (size,), device=run.device)]


def _wait(run: Run) -> None:
    if run.cuda:
        torch.cuda.synchronize()
