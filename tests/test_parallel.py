"""Modules in several processes: real ones, on scikit-learn's digits, against the same run in one process.

A helper process imports torch once and forks the ranks, as `torchrun` would start them; one test starts them for real.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from localprop.cli import main
from localprop.config import OptimConfig
from localprop.errors import ParallelError
from localprop.layout import IN_FLIGHT, arrange
from localprop.parallel import Job
from localprop.parallel.launch import leave_word
from localprop.parallel.messages import TensorForm
from localprop.report import format_bytes, read_losses, read_results
from localprop.state import TrainingState
from tiny import split

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

SMALL = [
    *["--model-kwargs", "patch_size=4", "window_size=2", "embed_dim=12", "depths=(1,1)", "num_heads=(1,2)"],
    *["--min-depth", "0", "--batch-size", "256", "--device", "cpu"],
]
# Everything that could make the runs differ: dropped paths, moved and mixed images, clipping, a moving average.
LIVELY = [
    *["--drop-path", "0.2", "--crop-pad", "1", "--hflip", "0.5", "--mixup", "0.2"],
    *["--clip-grad", "1", "--model-ema", "--model-ema-decay", "0.9"],
]
LONG = ["--epochs", "6"]
MODULES = {2: ["layers.0"], 3: ["patch_embed", "layers.0"], 4: ["patch_embed", "layers.0", "layers.1"]}
SECONDS = 300  # on a machine that has other things to do

FORKER = """
import json, os, sys, time, traceback, torch
import localprop.cli, localprop.running
torch.set_num_threads(1)
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

    def start(self, log, count, attempt=0, **task):
        """Starts ranks as torchrun does; with one, without."""
        # torchrun's agent holds the store, too: it must outlive the ranks.
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) if count > 1 else None
        children = []
        for rank in range(count):
            env = {"OMP_NUM_THREADS": "1"}
            if store:
                env |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "localhost"}
                env |= {"MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
                env |= {"TORCHELASTIC_RESTART_COUNT": attempt, "TORCHELASTIC_RUN_ID": "a job"}
            children.append(self.ask(env={k: str(v) for k, v in env.items()}, log=str(log), **task))
        return Ranks(self, log, store, children)

    def train(self, output, count, *flags, attempt=0, kind="modules"):
        parallel = ["--parallel", kind] if count > 1 else []
        argv = ["train", *flags, *parallel]
        return self.start(output / "log", count, attempt, argv=argv)


@pytest.fixture(scope="module")
def forker():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", FORKER], **pipes) as process:
        yield Forker(process)
        process.stdin.close()


def flags(output, modules, *more):
    return [*SMALL, *LIVELY, "--cuts", *MODULES[modules], "--output", str(output), "--experiment", "run", *more]


@pytest.fixture(scope="module")
def alone(forker, tmp_path_factory):
    """Gives the output folder of a finished run in one process, by its flags."""
    done = {}

    def get(modules, *more):
        if (modules, more) not in done:
            output = tmp_path_factory.mktemp("alone")
            assert forker.train(output, 1, *flags(output, modules, *more)).wait() == [0]
            done[modules, more] = output
        return done[modules, more]

    return get


def assert_same_run(output, other):
    """Weights, losses, accuracies and the newest checkpoint are the same, bit for bit."""
    a, b = (load_file(o / "run" / "model.safetensors") for o in (output, other))
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    for x, y in zip(*(read_results(o / "run" / "results.csv") for o in (output, other)), strict=True):
        for name in ("epoch", "step", "lr", "train_losses", "test_accuracies", "test_top5", "test_loss"):
            assert getattr(x, name) == getattr(y, name), name
    curves = [read_losses(o / "run" / "losses.csv") for o in (output, other)]
    assert [(row[0], *row[3:]) for row in curves[0]] == [(row[0], *row[3:]) for row in curves[1]]
    newest = [max((o / "run" / "checkpoints").glob("step-*")) for o in (output, other)]
    parts = [{path.name: path.read_bytes() for path in folder.glob("*.safetensors")} for folder in newest]
    assert parts[0] == parts[1]


@pytest.mark.parametrize(("modules", "parts"), [(2, 1), (3, 1), (4, 1), (2, 4)])
def test_a_process_for_each_module_gives_the_same_bits(forker, alone, tmp_path, modules, parts):
    more = ("--epochs", "2", "--micro-batches", str(parts))
    ranks = forker.train(tmp_path, modules, *flags(tmp_path, modules, *more))
    assert ranks.wait() == [0] * modules, ranks.log.read_text()
    assert_same_run(tmp_path, alone(modules, *more))
    for row in read_results(tmp_path / "run" / "results.csv"):  # of the process that takes most, what is in flight too
        assert row.peak_memory == pytest.approx(row.predicted_memory, rel=0.01)
    shown = (tmp_path / "log.out").read_text()
    assert all(shown.count(text) == 1 for text in ("run folder", "epoch 1/2", "epoch 2/2", "test accuracy"))


def test_modules_share_a_process_and_images_are_loaded_where_a_loss_looks_at_them(forker, alone, tmp_path):
    more = ("--epochs", "2", "--method", "infopro", "--micro-batches", "2")
    ranks = forker.train(tmp_path, 2, *flags(tmp_path, 4, *more))
    assert ranks.wait() == [0, 0], ranks.log.read_text()
    assert_same_run(tmp_path, alone(4, *more))


# No dropped paths, which replicas draw for themselves (timm's Swin has some unless told); and steps of the gradient's
# size, or else roundings of a gradient near zero would show.
CALM = [
    *[*SMALL[:6], "drop_path_rate=0.0", *SMALL[6:], "--crop-pad", "1", "--mixup", "0.2"],
    *["--clip-grad", "1", "--opt", "sgd", "--lr", "0.05", "--epochs", "1"],
]


@pytest.mark.parametrize(("kind", "count", "parts"), [("modules", 4, 1), ("modules", 4, 2), ("data", 2, 1)])
def test_replicas_agree_with_the_whole_batch(forker, tmp_path, kind, count, parts):
    settings = [*CALM, "--cuts", *MODULES[2], "--experiment", "run", "--micro-batches", str(parts)]
    runs = {name: tmp_path / name for name in ("one", "several")}
    for folder in runs.values():
        folder.mkdir()
    assert forker.train(runs["one"], 1, *settings, "--output", str(runs["one"])).wait() == [0]
    ranks = forker.train(runs["several"], count, *settings, "--output", str(runs["several"]), kind=kind)
    assert ranks.wait() == [0] * count, ranks.log.read_text()
    one, several = (load_file(folder / "run" / "model.safetensors") for folder in runs.values())
    for name, value in one.items():
        assert torch.allclose(several[name], value, rtol=1e-5, atol=1e-7), name
    (a,), (b,) = (read_results(folder / "run" / "results.csv") for folder in runs.values())
    assert b.train_losses == pytest.approx(a.train_losses, rel=1e-5)
    assert b.peak_memory == pytest.approx(b.predicted_memory, rel=0.01)


@pytest.mark.parametrize("steps", ["128", "256"])  # images at a time: 11 and 5 steps an epoch
def test_what_is_on_its_way_is_measured_where_most_memory_is_in_a_process_that_receives(forker, tmp_path, steps):
    settings = flags(tmp_path, 3, "--epochs", "1", "--batch-size", steps, "--method", "greedy", "--cuts", "patch_embed")
    ranks = forker.train(tmp_path, 2, *settings)
    assert ranks.wait() == [0, 0], ranks.log.read_text()
    (row,) = read_results(tmp_path / "run" / "results.csv")
    assert row.peak_memory == pytest.approx(row.predicted_memory, rel=0.005)
    assert "rank 1 (predicted)" in (tmp_path / "log.out").read_text()


def test_what_averaging_takes_is_predicted(forker, tmp_path):
    wide = ["--model", "test_vit", "--model-kwargs", "depth=1", "patch_size=8", "embed_dim=384", "num_heads=4"]
    settings = [*wide, "--modules", "1", "--method", "end-to-end", "--opt", "sgd", "--batch-size", "64", "--device"]
    settings += ["cpu", "--epochs", "1", "--output", str(tmp_path), "--experiment", "run"]
    ranks = forker.train(tmp_path, 2, *settings, kind="data")
    assert ranks.wait() == [0, 0], ranks.log.read_text()
    (row,) = read_results(tmp_path / "run" / "results.csv")
    assert row.peak_memory == pytest.approx(row.predicted_memory, rel=0.005)
    weights = sum(tensor.nbytes for tensor in load_file(tmp_path / "run" / "model.safetensors").values())
    assert row.peak_memory > 3.9 * weights  # with momenta, gradients and their copy


def test_a_run_that_goes_on_elsewhere_forgets_what_was_measured(forker, tmp_path):
    ranks = forker.train(tmp_path, 2, *flags(tmp_path, 2, *LONG))
    wait_for_step(tmp_path, 10)
    ranks.kill(0, signal.SIGTERM)
    assert ranks.wait() == [143, 143]
    assert forker.train(tmp_path, 1, "--resume", str(tmp_path / "run")).wait() == [0]
    first, *_, last = read_results(tmp_path / "run" / "results.csv")
    assert last.peak_memory == pytest.approx(last.predicted_memory, rel=0.01)
    assert last.peak_memory < 0.98 * first.peak_memory
    assert f"peak memory    {format_bytes(last.peak_memory)} measured" in (tmp_path / "log.out").read_text()


AVERAGE = """
import torch
from localprop import averaging
from localprop.parallel import join
from localprop.parallel.replicas import Replicas
averaging.BUCKET = 40  # bytes: several buckets, and some tensors alone
job = join("cpu")
kinds = [torch.float32, torch.bfloat16, torch.float32, torch.float64, torch.float32, torch.float32, torch.float32]
means = [torch.arange(3.0 * (k % 4 + 1)).view(3, -1).add(k).to(kinds[k]) for k in range(7)]
own = [mean + (1 if job.rank else -1) for mean in means]
own[5], own[6] = own[5].t().contiguous().t(), own[6].t().contiguous().t()
Replicas(job, [0, 1]).average(own)
for k, (tensor, mean) in enumerate(zip(own, means)):
    assert tensor.equal(mean), (k, tensor)
job.wait_for_all()
"""


def test_tensors_of_any_type_are_averaged_in_buckets(forker, tmp_path):
    ranks = forker.start(tmp_path / "log", 2, code=AVERAGE)
    assert ranks.wait() == [0, 0], ranks.log.read_text()


def wait_for_step(output, step):
    end = time.monotonic() + SECONDS
    while not any(int(p.name[5:]) >= step for p in (output / "run" / "checkpoints").glob("step-*[0-9]")):
        assert time.monotonic() < end, "no checkpoint came"
        time.sleep(0.005)


def test_stopped_by_a_signal_and_resumed_in_other_layouts_gives_the_same_bits(forker, alone, tmp_path):
    wanted = alone(3, *LONG)
    resume = ["--resume", str(tmp_path / "run")]
    ranks = forker.train(tmp_path, 2, *flags(tmp_path, 3, *LONG))
    wait_for_step(tmp_path, 5)
    ranks.kill(1, signal.SIGTERM)  # one of them alone
    assert ranks.wait() == [143, 143], ranks.log.read_text()
    assert ranks.log.read_text().count("stopped by SIGTERM") == 1
    first = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    ranks = forker.train(tmp_path, 1, *resume)
    wait_for_step(tmp_path, int(first.name[5:]) + 1)
    ranks.kill(0, signal.SIGTERM)
    assert ranks.wait() == [143], ranks.log.read_text()
    assert not (tmp_path / "run" / "model.safetensors").exists()
    ranks = forker.train(tmp_path, 3, *resume)
    assert ranks.wait() == [0, 0, 0], ranks.log.read_text()
    assert_same_run(tmp_path, wanted)


def test_a_killed_process_ends_all_and_the_job_started_again_goes_on(forker, alone, tmp_path):
    settings = flags(tmp_path, 3, *LONG)
    ranks = forker.train(tmp_path, 3, *settings)
    wait_for_step(tmp_path, 5)
    ranks.kill(1, signal.SIGKILL)
    before = time.monotonic()
    assert ranks.wait() == [1, -signal.SIGKILL, 1]
    assert time.monotonic() - before < 30
    # No path of gloo's code.
    line = r"localprop: rank [02] ends: [\w ]+ is gone \([^/\n]*\); it was killed[^/\n]*; go on with --resume \S+/run\n"
    assert re.fullmatch(line, ranks.log.read_text())
    again = forker.train(tmp_path, 3, *settings, attempt=1)
    assert again.wait() == [0, 0, 0], again.log.read_text()
    assert_same_run(tmp_path, alone(3, *LONG))


def test_a_job_started_again_leaves_other_runs_alone(forker, tmp_path):
    """torchrun calls many jobs "none": what another of that name did is not to be gone on with."""
    settings = [*CALM, "--cuts", *MODULES[2], "--output", str(tmp_path)]
    assert forker.train(tmp_path, 2, *settings).wait() == [0, 0]
    (other,) = (path for path in tmp_path.iterdir() if path.is_dir())
    before = (other / "model.safetensors").read_bytes()
    assert forker.train(tmp_path, 2, *settings, "--seed", "7", attempt=1).wait() == [0, 0]
    assert (other / "model.safetensors").read_bytes() == before
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2


def test_a_job_started_again_takes_the_empty_folder_that_was_left(forker, tmp_path):
    (tmp_path / "run").mkdir()
    settings = [*CALM, "--cuts", *MODULES[2], "--output", str(tmp_path), "--experiment", "run"]
    ranks = forker.train(tmp_path, 2, *settings)
    assert sorted(ranks.wait()) == [1, 2]
    assert "/run exists already" in ranks.log.read_text()
    assert forker.train(tmp_path, 2, *settings, attempt=1).wait() == [0, 0]
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_memory_that_runs_out_among_messages_is_not_a_lost_process():
    job = object.__new__(Job)
    with pytest.raises(torch.OutOfMemoryError), job.talking():
        raise torch.OutOfMemoryError("out of memory")
    with pytest.raises(ParallelError, match="rank 3 is gone"), job.talking("rank 3"):
        raise RuntimeError("connection closed")


def test_processes_that_lose_each_other_and_are_not_killed_end_with_a_line(monkeypatch, capsys):
    def lose(*_):
        def processes(*_):
            assert leave_word("rank 1 ends: rank 0 is gone")
            raise ChildFailedError("a job", {rank: ProcessFailure(rank, rank, 1, "") for rank in range(2)})

        return processes

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", lose)
    assert main(["train", "--modules", "2", "--parallel", "modules", "--nproc", "2"]) == 2
    assert capsys.readouterr().err == "localprop: rank 1 ends: rank 0 is gone\n"


def test_a_loss_that_is_not_finite_ends_all_with_one_line(forker, tmp_path):
    ranks = forker.train(tmp_path, 2, *flags(tmp_path, 2, "--epochs", "2", "--lr", "1e30", "--sched", "none"))
    assert sorted(ranks.wait()) == [1, 2]
    assert re.fullmatch(
        r"localprop: rank 0: the loss of module 1 of 2 \(.*\) is nan at step 2.*\n", ranks.log.read_text()
    )


def test_the_launcher_says_who_was_killed_and_leaves_nothing(tmp_path):
    command = [sys.executable, "-m", "localprop", "train", *flags(tmp_path, 2, "--epochs", "400")]
    process = subprocess.Popen(
        [*command, "--parallel", "modules", "--nproc", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_step(tmp_path, 5)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(children) == 2
    os.kill(children[1], signal.SIGKILL)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 2
    line = r"localprop: rank 1 \(module 2 of 2: layers\.1 \.\.\. head\) was killed by SIGKILL .* --resume \S+/run\n"
    assert re.fullmatch(line, error)
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


def test_a_reader_that_has_read_enough_is_no_error(tmp_path):
    command = [sys.executable, "-m", "localprop", "train", *flags(tmp_path, 2, "--epochs", "1")]
    command += ["--parallel", "modules", "--nproc", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "starting 2 processes\n"
    process.stdout.close()
    assert process.wait(timeout=SECONDS) == 141
    assert process.stderr.read() == ""
    process.stderr.close()


@pytest.fixture
def no_processes(monkeypatch):
    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", lambda *_: pytest.fail("it started processes"))


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--modules", "2", "--parallel", "modules"], "3 replicas; take --batch-size 33"),
        (["--micro-batches", "2", "--parallel", "data"], "6 replicas of 2 micro-batches; take --batch-size 36"),
    ],
)
def test_a_batch_that_replicas_cannot_share_starts_no_processes(flags, wanted, no_processes, capsys):
    assert main(["train", *flags, "--batch-size", "32", "--nproc", "6"]) == 2
    line = capsys.readouterr().err
    assert f"--batch-size 32 does not divide equally into {wanted}" in line
    assert line.count("\n") == 1


def test_a_run_folder_that_exists_starts_no_processes(tmp_path, no_processes, capsys):
    (tmp_path / "run").mkdir()
    own = ["--output", str(tmp_path), "--experiment", "run", "--modules", "2"]
    assert main(["train", *own, "--parallel", "modules", "--nproc", "2"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.endswith(f"/run exists already; choose another --experiment, or go on with --resume {tmp_path}/run\n")


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there are two GPUs")
def test_a_gpu_for_each_process_is_looked_for_before_they_start(no_processes, capsys):
    assert main(["train", "--modules", "2", "--device", "cuda", "--parallel", "modules", "--nproc", "2"]) == 2
    line = capsys.readouterr().err
    assert re.fullmatch(r"localprop: process 2 on this machine has no GPU, there are [01]; start fewer, .*\n", line)


@pytest.mark.parametrize("shared", [["--modules", "2"], ["--cuts", "layers.0"], []])
def test_processes_that_cannot_share_the_modules_are_not_started(shared, no_processes, capsys):
    count = 3 if shared else 5
    assert main(["train", *shared, "--parallel", "modules", "--nproc", str(count)]) == 2
    line = capsys.readouterr().err
    most = count - 1
    assert (
        f"{count} processes cannot share {most} modules; take at most {most}, or a multiple such as {2 * most}" in line
    )
    assert line.count("\n") == 1


HAND_ON = """
import os, time, torch
from localprop.carry import Carry
from localprop.parallel import join
from localprop.parallel.messages import Receiver, Sender
job = join("cpu")
path, count = os.environ["SENT"], 20
if job.rank == 0:
    sender = Sender(job, 1)
    for step in range(count):
        sender.wait_for_room()
        sender.send(Carry(torch.full((64, 1024), float(step)), torch.zeros(64)), True, step == 0)
        open(path, "w").write(str(step + 1))
else:
    time.sleep(0.5)
    for step, carry in enumerate(Receiver(job, 0).stream(count)):
        assert carry.features.eq(step).all()
        time.sleep(0.05)
        ahead = int(open(path).read() or 0) - step
        with open(path + ".ahead", "a") as file:
            print(ahead, file=file)
job.wait_for_all()
"""


def test_a_slow_stage_holds_up_the_one_before(forker, tmp_path, monkeypatch):
    code = HAND_ON.replace('os.environ["SENT"]', repr(str(tmp_path / "sent")))
    ranks = forker.start(tmp_path / "log", 2, code=code)
    assert ranks.wait() == [0, 0], ranks.log.read_text()
    ahead = [int(line) for line in (tmp_path / "sent.ahead").read_text().split()]
    # The batch that is worked on, those that wait here, and those that are on their way.
    assert 1 < max(ahead) <= 1 + 2 * IN_FLIGHT


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(4, 3, 5),
        torch.randn(4, 6, 5, 5).to(memory_format=torch.channels_last),
        torch.randn(4, 5, 3).transpose(1, 2),
        torch.randn(4, 6, 8)[:, 1:],
        torch.randn(4, 1, 3).expand(4, 7, 3),
        torch.arange(12)[3:],
        torch.tensor(2.5),
    ],
    ids=lambda tensor: str(tuple(tensor.stride())),
)
def test_a_tensor_arrives_as_it_lay_in_memory(tensor):
    form = TensorForm.of(tensor)
    buffer = form.buffer(torch.device("cpu"))
    buffer.copy_(form.bytes_of(tensor))
    arrived = form.restore(buffer)
    assert torch.equal(arrived, tensor)
    if 0 not in tensor.stride():
        assert arrived.stride() == tensor.stride()
        assert arrived.data_ptr() % 64 == tensor.data_ptr() % 64


@pytest.mark.parametrize("name", ["swin", "vit", "resnet", "cnn"])
def test_shares_are_all_of_the_backbone_and_a_stage_holds_its_own_alone(name):
    whole = split(name)
    shares = whole.shares()
    assert sorted(key for share in shares for key in share) == sorted(whole.backbone.state_dict())
    for k, module in enumerate(whole.local_modules):
        own = {n for n, _ in module.named_parameters() if not n.startswith("auxiliary.")}
        assert own <= set(shares[k])
    for path, module in whole.backbone.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # its statistics go where its weights are trained
            owners = {k for k, share in enumerate(shares) for key in module.state_dict() if f"{path}.{key}" in share}
            assert len(owners) == 1
    state = TrainingState(whole, OptimConfig(model_ema=True), 10, torch.device("cpu"), range(1, 2))
    held = {key for key, value in whole.backbone.named_parameters() if not value.is_meta}
    assert held == {key for key in shares[1] if key in dict(whole.backbone.named_parameters())}
    assert {key for key, value in state.ema.module.named_parameters() if not value.is_meta} == held
    assert all(p.is_meta for k in (0, 2) for p in whole.local_modules[k].auxiliary.parameters())
    assert set(state.parts()) == {"module-1"}


def test_modules_are_shared_out_by_time_and_replicas_come_in_multiples():
    def stages(*arguments):
        layout = arrange("modules", *arguments)
        assert layout.replicas == 1
        return [list(modules) for modules in layout.stages]

    assert stages(4, 4) == [[0], [1], [2], [3]]
    assert stages(4, 2) == [[0, 1], [2, 3]]
    assert stages(4, 2, [5.0, 1.0, 1.0, 1.0]) == [[0], [1, 2, 3]]
    assert arrange("modules", 2, 6).replicas == 3
    assert [arrange("modules", 2, 6).place(rank) for rank in range(4)] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert arrange("data", 4, 3).stages == (range(4),)
    with pytest.raises(ParallelError, match="take at most 2, or a multiple such as 6"):
        arrange("modules", 2, 5)
