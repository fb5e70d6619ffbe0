"""Random numbers that depend on where they are used, not on what was drawn before.

So batches, crops, dropout and stochastic depth are the same after a restart, with any number of worker processes,
and wherever a module runs.
"""

from typing import Literal

import numpy as np

_PURPOSES = ("order", "crop", "image", "mix", "step", "module")


def derive_seed(
    seed: int, purpose: Literal["order", "crop", "image", "mix", "step", "module"], *place: int
) -> int:
    """A 63-bit seed for one `purpose` at one `place`, such as (epoch, batch); unrelated to that of any other."""
    # The run's seed comes last: it alone may take more than one of SeedSequence's 32-bit words.
    words = [_PURPOSES.index(purpose), *place, seed % 2**64]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)
