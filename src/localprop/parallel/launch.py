"""Starting the processes of a run: torch's elastic agent, as torchrun starts it, and one line if that goes wrong."""

import json
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

from localprop.commands import resume_command
from localprop.config import TrainConfig, require_equal_parts
from localprop.errors import ParallelError
from localprop.plugins import load_plugin

RANKS = "LOCALPROP_RANKS"
"""Names a file in the environment of processes that `launch` started, into which they write what each one trains."""


def launch(config: TrainConfig, processes: int, argv: Sequence[str]) -> int:
    """Runs `localprop train` in several processes on this machine, and waits for them.

    SIGTERM and SIGINT go on to the processes, which then save a checkpoint.

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
    # Before torch is imported, here and there: its warnings of sockets mean nothing to a user.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _check(config, processes)
    print(f"starting {processes} process{'es' * (processes > 1)}", flush=True)
    logging.disable(logging.CRITICAL)  # the agent tells at length what the processes have said already
    with tempfile.TemporaryDirectory() as folder:
        ranks = Path(folder, "ranks.json")
        os.environ[RANKS] = str(ranks)
        launched = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            rdzv_configs={"keep_alive_interval": 1},  # seconds, of a thread that an interrupted agent waits for
            max_restarts=0,
        )
        try:
            elastic_launch(launched, sys.executable)("-m", "localprop", "train", *argv)
        except SignalException as stop:
            return 128 + int(stop.sigval)
        except ChildFailedError as error:
            codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            # What the agent ended itself, because of another, ended by SIGTERM.
            killed = [rank for rank, code in codes.items() if code < 0 and code != -signal.SIGTERM]
            if killed and max(codes.values()) < 2:
                raise ParallelError(_obituary(killed[0], -codes[killed[0]], ranks)) from None
            if _last_word(ranks).exists():
                raise ParallelError(_last_word(ranks).read_text()) from None
            return max([code for code in codes.values() if code > 0], default=128 + signal.SIGTERM)
        finally:
            logging.disable(logging.NOTSET)
            del os.environ[RANKS]
    return 0


def _check(config: TrainConfig, processes: int) -> None:
    from localprop.layout import arrange
    from localprop.methods import check_method
    from localprop.parallel.job import takes_gpu

    takes_gpu(config.run.device, processes - 1)
    if config.run.resume is None:
        config.run.require_new_folder()
    local, optim = config.local, config.optim
    if local.budget is not None:  # which chooses the number of modules
        return
    load_plugin(config.backbone.plugin)
    cut = None if local.cuts is None else len(local.cuts) + 1
    count = check_method(local.method, cut or local.modules, dict(local.method_kwargs or {}))
    layout = arrange(config.run.parallel or "modules", count, processes)
    require_equal_parts(optim.batch_size, optim.micro_batches, layout.replicas)


def describe_ranks(ranks: Sequence[str], folder: Path, checkpoints: Path) -> None:
    """Leaves word for `launch`, where that started this process.

    Args:
        ranks: what each one trains.
        folder: the run folder.
        checkpoints: where in it checkpoints are written.
    """
    if RANKS in os.environ:
        known = {"ranks": list(ranks), "folder": str(folder), "checkpoints": str(checkpoints)}
        Path(os.environ[RANKS]).write_text(json.dumps(known))


def leave_word(line: str) -> bool:
    """Leaves it to `launch`, where that started this process, to say why the job has failed; whether it did."""
    if RANKS in os.environ:
        _last_word(Path(os.environ[RANKS])).write_text(line)
    return RANKS in os.environ


def _last_word(ranks: Path) -> Path:
    return ranks.with_name("last word")


def _obituary(rank: int, number: int, ranks: Path) -> str:
    from localprop.checkpoint import has_checkpoint

    name = signal.Signals(number).name
    cause = f"{name} (by hand, or because memory ran out)" if number == signal.SIGKILL else name
    try:
        known = json.loads(ranks.read_text())
    except (OSError, ValueError):
        return f"rank {rank} was killed by {cause} before training began"
    folder, goes_on = known["folder"], has_checkpoint(Path(known["checkpoints"]))
    then = resume_command(Path(folder)) + ("" if goes_on else ", which starts anew: there is no checkpoint yet")
    return f"rank {rank} ({known['ranks'][rank]}) was killed by {cause}; resume with: {then}"
