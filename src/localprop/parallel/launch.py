"""Starting the processes of a run on this machine, and one line if that goes wrong."""

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from localprop.errors import ParallelError, counted
from localprop.parallel.children import Children
from localprop.settings.bounds import require_equal_parts
from localprop.settings.config import TrainConfig
from localprop.system.commands import interpreter_words, resume_command
from localprop.system.launched import described_ranks, failure_line
from localprop.system.lock import require_new_folder
from localprop.system.plugins import load_plugin


def launch(config: TrainConfig, processes: int, argv: Sequence[str]) -> int:
    """Runs `localprop train` in several processes on this machine, and waits for them.

    They meet in a folder that their owner alone can open, and talk over the loopback interface. SIGTERM and SIGINT are
    passed on to them: they save a checkpoint. When this process dies, they end within seconds.

    Args:
        config: the settings; what cannot be is said before processes start, as far as these alone tell.
        processes: their number.
        argv: the flags that give these settings.

    Returns:
        The exit code: that of a process that failed with a line of its own, 128 + the number of the signal that ended
        the run, or 0.

    Raises:
        ConfigError: a method, a batch that the processes cannot share out, or a run folder that exists.
        ParallelError: so many processes cannot share the modules, or have no GPU each; or one was killed: the line says
            which, what it trained and by what; or they have lost each other.
    """
    # For the processes, which import torch after this: its warnings of sockets mean nothing to a user.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    _check(config, processes)
    print(f"starting {counted(processes, 'process', 'processes')}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="localprop-"))  # for its owner alone
    children = Children()
    try:
        children.run(interpreter_words("train", *argv), processes, folder)
        return _exit_code(children, folder, config)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check(config: TrainConfig, processes: int) -> None:
    from localprop.methods import check_method
    from localprop.parallel.job import takes_gpu
    from localprop.parallel.loopback import loopback_interface
    from localprop.parallel.placement import arrange

    takes_gpu(config.run.device, processes - 1)
    loopback_interface()
    if config.run.resume is None:
        require_new_folder(config.run.output, config.run.experiment)
    local, optim = config.local, config.optim
    if local.budget is not None:  # which chooses the number of modules
        return
    load_plugin(config.backbone.plugin)
    cut = None if local.cuts is None else len(local.cuts) + 1
    count = check_method(local.method, cut or local.modules, dict(local.method_kwargs or {}))
    placement = arrange(config.run.parallel or "modules", count, processes)
    require_equal_parts(optim.batch_size, optim.micro_batches, placement.replicas)


def _exit_code(children: Children, folder: Path, config: TrainConfig) -> int:
    codes = [code for _, code in children.ended]
    if not any(codes):
        return 0
    # Below 2, a process only saw that another was gone. SIGTERM ends one by this code while it decodes images.
    told = {(rank, 128 + signal.SIGTERM) for rank in children.ended_by_us}
    failure = next((code for rank, code in children.ended if code > 1 and (rank, code) not in told), 0)
    stop = 128 + children.signal if children.signal else 0
    if failure:
        return stop if stop and failure in (128 + signal.SIGTERM, 128 + signal.SIGINT) else failure
    quiet = (-signal.SIGTERM, -signal.SIGINT)
    for rank, code in children.ended:
        if code < 0 and code not in quiet and rank not in children.ended_by_us:
            raise ParallelError(_killed_line(rank, -code, folder, config))
    if stop:
        print("localprop: stopped", file=sys.stderr)
        return stop
    if line := failure_line(folder):
        raise ParallelError(line)
    return max([code for code in codes if code > 0], default=128 + signal.SIGTERM)


def _killed_line(rank: int, number: int, folder: Path, config: TrainConfig) -> str:
    from localprop.training.checkpoints.folder import has_checkpoint

    name = signal.Signals(number).name
    cause = f"{name} (by hand, or because memory ran out)" if number == signal.SIGKILL else name
    known = described_ranks(folder)
    if known is None:
        return f"rank {rank} was killed by {cause} before training began"
    then = resume_command(Path(known.run), config.backbone.plugin, config.run.steps)
    then += "" if has_checkpoint(Path(known.checkpoints)) else ", which starts anew: there is no checkpoint yet"
    return f"rank {rank} ({known.names[rank]}) was killed by {cause}; resume with: {then}"
