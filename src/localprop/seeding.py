"""Random numbers that depend on where they are used, not on what was drawn before.

So batches, crops, dropout and stochastic depth are the same after a restart, with any number of worker processes,
and wherever a module runs.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import numpy as np
import torch

Purpose = Literal["order", "crop", "image", "mix", "step", "module", "test", "ahead", "backward"]
_PURPOSES = get_args(Purpose)  # a new one comes last: seeds are made of their numbers


def derive_seed(seed: int, purpose: Purpose, *place: int) -> int:
    """A 63-bit seed for one `purpose` at one `place`, such as (epoch, batch); unrelated to that of any other."""
    # The run's seed comes last: it alone may take more than one of SeedSequence's 32-bit words.
    words = [_PURPOSES.index(purpose), *place, seed % 2**64]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


def generator(seed: int) -> torch.Generator:
    """A generator of its own on the CPU, so that every device sees the same crops and flips."""
    return torch.Generator().manual_seed(seed)


@contextmanager
def drawn_seed() -> Iterator[int]:
    """A seed that PyTorch's generator on the CPU draws. Afterwards it goes on from there, whatever is seeded inside.

    The generator takes 32 bits of a seed. If each seed were drawn from what the one before has seeded, the draws would
    begin to repeat within some ten thousand.
    """
    seed = int(torch.randint(2**62, (), device="cpu"))
    with torch.random.fork_rng(devices=[]):
        yield seed


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the global generators of Python, NumPy and PyTorch (CPU); afterwards restores their states."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        # torch.manual_seed would also seed, and leave seeded, every CUDA device.
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
