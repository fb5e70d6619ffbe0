"""Real processes for tests: a helper imports torch once and forks the ranks of a job, as localprop or torchrun do."""

import contextlib
import json
import os
import signal
import socket
import tempfile
import time

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from localprop.parallel.loopback import loopback_interface
from localprop.report.losses import read_losses
from localprop.report.results import read_results

SMALL = [
    *["--model-kwargs", "patch_size=4", "window_size=2", "embed_dim=12", "depths=(1,1)", "num_heads=(1,2)"],
    *["--min-depth", "0", "--batch-size", "256", "--device", "cpu"],
]
# Everything that could make the runs differ: dropped paths, moved and mixed images, clipping, a moving average.
LIVELY = [
    *["--drop-path", "0.2", "--crop-pad", "1", "--hflip", "0.5", "--mixup", "0.2"],
    *["--clip-grad", "1", "--model-ema", "--model-ema-decay", "0.9"],
]
CALM = [
    *[*SMALL[:6], "drop_path_rate=0.0", *SMALL[6:], "--crop-pad", "1", "--mixup", "0.2"],
    *["--clip-grad", "1", "--opt", "sgd", "--lr", "0.05", "--epochs", "1"],
]
LONG = ["--epochs", "6"]
MODULES = {2: ["layers.0"], 3: ["patch_embed", "layers.0"], 4: ["patch_embed", "layers.0", "layers.1"]}
SECONDS = 300  # on a machine that has other things to do

# Whatever a rank imports is imported here, once, and lives to the end.
FORKER = """
import gc, json, os, sys, time, traceback, sklearn.datasets, torch
import localprop.cli.train, localprop.runs.run
torch.set_num_threads(1)
gc.collect()
gc.freeze()
for line in sys.stdin:
    task = json.loads(line)
    if "wait" in task:
        end = time.monotonic() + task["seconds"]
        while not (found := os.waitpid(task["wait"], os.WNOHANG))[0] and time.monotonic() < end:
            time.sleep(0.01)
        print(os.waitstatus_to_exitcode(found[1]) if found[0] else "running", flush=True)
        continue
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.environ.update(task["env"])
            os.dup2(os.open(task["log"] + ".out", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
            os.dup2(os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            code = localprop.cli.main(task["argv"]) if "argv" in task else exec(task["code"], {}) or 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    print(child, flush=True)
"""


class Ranks:
    """The processes of one job."""

    def __init__(self, forker, log, store, children):
        self.forker, self.log, self.store, self.children = forker, log, store, children

    def wait(self):
        """Exit codes, by rank; nothing may hang."""
        codes = []
        try:
            for child in self.children:
                codes.append(self.forker.ask(wait=child, seconds=SECONDS))
        finally:
            for rank in range(len(codes), len(self.children)):  # after a failure: those not waited for yet
                self.kill(rank, signal.SIGKILL)
        return codes

    def kill(self, rank, number):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.children[rank], number)


class Forker:
    def __init__(self, process):
        self.process = process

    def ask(self, **task):
        print(json.dumps(task), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline().strip()
        assert answer != "running", "a process hangs"
        return int(answer)

    def start(self, log, count, attempt=None, **task):
        """Starts ranks as `--nproc` does or, where the number of the attempt is given, as torchrun does.

        Each entry of a task is for all ranks; a tuple has one for each.
        """
        common, store = {"OMP_NUM_THREADS": "1"}, None
        if count > 1 and attempt is None:
            common |= {"LOCALPROP_JOB": tempfile.mkdtemp(dir=log.parent)}
        elif count > 1:
            store = store_on_loopback()  # torchrun's agent holds it, too: it must outlive the ranks
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
            common |= {"TORCHELASTIC_RESTART_COUNT": attempt, "TORCHELASTIC_RUN_ID": "a job"}
            common |= {"GLOO_SOCKET_IFNAME": loopback_interface()}
        children = []
        for rank in range(count):
            env = common | ({"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count} if count > 1 else {})
            own = {key: value[rank] if isinstance(value, tuple) else value for key, value in task.items()}
            children.append(self.ask(env={k: str(v) for k, v in env.items()}, log=str(log), **own))
        return Ranks(self, log, store, children)

    def train(self, output, count, *flags, attempt=None, kind="modules"):
        parallel = ["--parallel", kind] if count > 1 else []
        argv = ["train", *flags, *parallel]
        return self.start(output / "log", count, attempt, argv=argv)


def store_on_loopback():
    """A store that only this machine reaches; torch's own socket would listen everywhere."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def flags(output, modules, *more):
    return [*SMALL, *LIVELY, "--cuts", *MODULES[modules], "--output", str(output), "--experiment", "run", *more]


def assert_same_run(output, other):
    """Weights, losses, accuracies and the newest checkpoint are the same, bit for bit."""
    a, b = (load_file(o / "run" / "model.safetensors") for o in (output, other))
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    for x, y in zip(*(read_results(o / "run" / "results.csv") for o in (output, other)), strict=True):
        for name in ("epoch", "step", "lr", "train_losses", "heads", "network"):
            assert getattr(x, name) == getattr(y, name), name
    curves = [read_losses(o / "run" / "losses.csv") for o in (output, other)]
    assert [(row[0], *row[3:]) for row in curves[0]] == [(row[0], *row[3:]) for row in curves[1]]
    newest = [max((o / "run" / "checkpoints").glob("step-*")) for o in (output, other)]
    parts = [{path.name: path.read_bytes() for path in folder.glob("*.safetensors")} for folder in newest]
    assert parts[0] == parts[1]


def wait_for_step(output, step):
    end = time.monotonic() + SECONDS
    while not any(int(p.name[5:]) >= step for p in (output / "run" / "checkpoints").glob("step-*[0-9]")):
        assert time.monotonic() < end, "no checkpoint came"
        time.sleep(0.005)
