"""The command line: `localprop train | plan | bench | eval | export | chain`.

Each command is a module with a function `prepare`. It reads the flags, then imports what the command runs, and returns
the work to do. Importing torch takes seconds: `--help` and a mistyped flag are answered before that.
"""

import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence

from localprop import __version__
from localprop.errors import ConfigError, LocalpropError, printable, suggestion
from localprop.system.startup import release_interrupts

USAGE = """\
usage: localprop COMMAND [OPTIONS]

Train transformers, and other models, without end-to-end backpropagation.

  train          train a model; without options, a small Swin on digits
  plan           predict memory and time of training, without GPU and data
  bench SUITE    run a grid of trainings, and make tables and pictures of them
  eval RUN       measure the accuracy of a run's weights
  export RUN     write a run's weights as a folder that timm.create_model loads
  chain MODEL    show the units that a model can be cut into

localprop COMMAND --help lists the options of a command.
"""

COMMANDS = ("train", "plan", "bench", "eval", "export", "chain")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code.

    0, or 2 for a user's mistake, 75 for a suite whose time is up with runs left, 128 + signal.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(USAGE, end="")
            return 0 if argv else 2
        if argv[0] == "--version":
            print(f"localprop {__version__}")
            return 0
        work = _prepare(argv[0], argv[1:])
        release_interrupts()  # until here, Ctrl-C ends the process at once
        code = work()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of the pipe has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except LocalpropError as error:
        print(f"localprop: {printable(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:  # of a path that the user has named, or of the disk
        if error.filename is None:
            raise
        print(f"localprop: {printable(f'{error.filename}: {error.strerror}; check the path')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # outside of training, which saves a checkpoint first
        print("localprop: stopped", file=sys.stderr)
        return 130


def _prepare(name: str, argv: Sequence[str]) -> Callable[[], int]:
    if name not in COMMANDS:
        raise ConfigError(f"no command is called {name!r}; {suggestion(name, COMMANDS)}")
    return importlib.import_module(f"localprop.cli.{name}").prepare(argv)
