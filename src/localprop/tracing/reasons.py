"""Why a forward, or a part of it, cannot be traced: one plain line for the user."""

import linecache
import sys
from pathlib import Path
from traceback import walk_tb

from timm.models import is_notrace_module
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.proxy import TraceError

from localprop.errors import first_line, printable

# Whose code runs while a model is traced and is not the model's.
_OTHERS = sys.stdlib_module_names | {"torch", "localprop"}
_MOST = 200  # characters of what somebody else's code says
_MOVE = "move that code into a module of its own"


def why_no_chain(error: Exception) -> str:
    """Why a whole model cannot be traced, and what to do."""
    text, place = _text(error), _place(error)
    if isinstance(error, TraceError):
        return f"{text}{place}, which cannot be traced; {_MOVE}"
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        return f"what its forward does depends on pixel values ({text}){place}; keep such code out of the model"
    return (
        f"its forward fails ({type(error).__name__}: {text}){place}; check input_size, that forward takes images "
        "alone, and that the model is not compiled"
    )


def why_whole(error: Exception) -> str:
    """Why one part of a model cannot be cut inside, and what to do."""
    text, place = _text(error), _place(error)
    if isinstance(error, TraceError):
        return f"{text}{place}; {_MOVE}"
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        return f"what it does depends on the values of a tensor ({text}){place}; {_MOVE}"
    return f"its forward fails when it is traced ({type(error).__name__}: {text}){place}; {_MOVE}"


def why_not_opened(module: nn.Module) -> str:
    """Why the forward of a module is not traced at all."""
    kind = type(module).__name__
    if is_notrace_module(type(module)):
        return f"timm lists {kind} among the modules that cannot be traced"
    return f"torch's own {kind} computes otherwise without gradients than with, which no trace shows"


def _text(error: Exception) -> str:
    return printable(first_line(error)[:_MOST])


def _place(error: Exception) -> str:
    """The line of the model's own code at which an exception was raised; empty where it was raised elsewhere."""
    frames = [
        (frame.f_code.co_filename, line)
        for frame, line in walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in _OTHERS
    ]
    if not frames:
        return ""
    file, line = frames[-1]
    code = printable(linecache.getline(file, line).strip()[:_MOST])
    return f" in line {line} of {printable(Path(file).name)}" + (f" ({code})" if code else "")
