"""Two machines: two agents of torchrun that only share an address and a folder, against one process."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

SECONDS = 240
FLAGS = [
    *["--model-kwargs", "patch_size=4", "window_size=2", "embed_dim=12", "depths=(1,1)", "num_heads=(1,2)"],
    *["--min-depth", "0", "--batch-size", "256", "--device", "cpu", "--cuts", "layers.0", "--epochs", "2"],
    *["--drop-path", "0.2", "--crop-pad", "1", "--hflip", "0.5", "--clip-grad", "1", "--experiment", "run"],
]
# Where features and gradients travel. torchrun's own store listens on all interfaces while the test runs.
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


def start(*words):
    return subprocess.Popen(
        [sys.executable, *words],
        env=os.environ | LOOPBACK,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    _, error = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, error


def end(process):
    process.terminate()  # an agent ends what it started
    try:
        process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.processes
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the loopback interface is called lo on Linux")
def test_two_agents_with_a_rendezvous_give_the_same_bits(tmp_path):
    agent = [
        *["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "0"],
        *["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "two-machines"],
        *["--local-addr", "127.0.0.1", "-m", "localprop", "train", *FLAGS],
        *["--parallel", "modules", "--trace", "--output", str(tmp_path / "two")],
    ]
    processes = []
    try:
        processes += [start(*agent), start(*agent)]
        for process in processes:
            finish(process)
        processes.append(start("-m", "localprop", "train", *FLAGS, "--output", str(tmp_path / "one")))
        finish(processes[-1])
    finally:
        for process in processes:
            if process.poll() is None:
                end(process)
    one, two = (load_file(tmp_path / name / "run" / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert (tmp_path / "two" / "run" / "timeline.png").exists()
