"""Every error a user can meet.

A message is one line: what is wrong, where, and what to do. The command line prints it without a traceback
and exits with code 2. An error of any other type is a defect of localprop and keeps its traceback.
"""

import difflib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class LocalpropError(Exception):
    """A mistake of the user, or of the surroundings, with its remedy.

    Its text is one line, whatever the names of files and classes in it.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(LocalpropError):
    """A setting that does not exist or has no meaning."""


class ChainError(LocalpropError):
    """A backbone that cannot be cut, or not where or as often as asked."""


class DataError(LocalpropError):
    """A dataset that is missing, damaged or inconsistent."""


class CheckpointError(LocalpropError):
    """A checkpoint or run folder that is missing, damaged or of another run."""


class PlanError(LocalpropError):
    """Memory that cannot be predicted, or a budget that nothing fits."""


class BenchError(LocalpropError):
    """A suite that cannot be read or run, or results that do not fit it."""


class OutOfMemory(LocalpropError):
    """Training needed more memory than there is."""


class ParallelError(LocalpropError):
    """Processes that cannot share the modules out, or one that is gone."""


class NonFiniteLossError(LocalpropError):
    """A local loss that is NaN or infinite; raised before the weights of its module are touched."""


class NonFiniteGradientError(NonFiniteLossError):
    """A gradient that is NaN or infinite; raised before the weights of its module are touched."""


class NonFiniteWeightError(CheckpointError):
    """A weight or a buffer that is NaN or infinite, and so is neither saved nor loaded."""


@contextmanager
def batch_norm_told(place: str, images: int) -> Iterator[None]:
    """Turns what torch raises where batch norm is to train on one value per channel into a ConfigError.

    Args:
        place: what has the batch norm.
        images: in the batch, or micro-batch.
    """
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("Expected more than 1 value per channel"):
            raise
        raise ConfigError(
            f"{place} has a batch norm with one value per channel, which cannot be trained: a batch, or micro-batch, "
            f"has {counted(images, 'image')}; raise the batch size or take fewer micro-batches"
        ) from None


def suggestion(word: str, known: Iterable[str]) -> str:
    """Names what `word` may have meant among the `known` words, for the end of an error's line."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {listing(known)}"


def listing(words: Iterable[object], most: int = 5) -> str:
    """Names things in a message: the first `most` of them, then how many more there are."""
    names = [str(word) for word in words]
    shown = printable(", ".join(names[:most]))
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def printable(text: str) -> str:
    """The text with escapes for what would break the line, or what a terminal would take for a command."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def counted(count: int, noun: str, plural: str = "") -> str:
    """A number with its noun, such as "1 image" or "2 images"."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def shortened(text: object, most: int = 60) -> str:
    """A text in one line of at most `most` characters, with escapes for what does not print."""
    line = printable(str(text)[: most + 1])
    return line if len(line) <= most else f"{line[: most - 3]}..."


def shown(value: object, most: int = 60) -> str:
    """A value in a message: as Python writes it, in at most `most` characters."""
    try:
        # Python refuses to write whole numbers of thousands of digits.
        return "a number of more than 24 digits" if _is_long(value) else shortened(repr(value), most)
    except ValueError:
        return f"a {type(value).__name__} with a number of thousands of digits"


def _is_long(value: object) -> bool:
    return isinstance(value, int) and abs(value) >= 10**24


def first_line(error: BaseException) -> str:
    """The first line of what an exception says; the name of its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_WARNED: set[str] = set()


def warn_renamed(old: str, new: str, stacklevel: int = 2) -> None:
    """Warns the first time that a program uses a name of version 0.1: it is gone in the next version.

    Python's own filter warns once for each line, but forgets that whenever a library changes the filters, as torch does
    in training: a method of version 0.1 would warn at many steps.

    Args:
        old: the name, such as "Carry.labels".
        new: what it is called now.
        stacklevel: frames from here to the code that uses it, as `warnings.warn` counts them.
    """
    if old not in _WARNED:
        warnings.warn(f"{old} is called {new} now", DeprecationWarning, stacklevel=stacklevel + 1)
        _WARNED.add(old)
