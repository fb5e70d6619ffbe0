"""How long a batch takes on several processes: the orders of work that there are, run on a clock instead of a machine.

Every order is played out event by event. A rank computes one thing at a time in the order that its schedule says, a
link carries one message at a time in each direction, and nothing starts before what it needs is there. All else is
arithmetic on measured (or predicted) times: no constant is fitted.

The files: clock.py (times, links, and events that wait for each other), local.py (local modules), pipelined.py (1F1B
and zero-bubble), replicated.py (data parallelism).
"""

from localprop.planning.schedules.clock import Link, StageTime, Timing
from localprop.planning.schedules.local import local_modules
from localprop.planning.schedules.pipelined import one_f_one_b, one_f_one_b_order, zero_bubble
from localprop.planning.schedules.replicated import data_parallel

__all__ = [
    "Link",
    "StageTime",
    "Timing",
    "data_parallel",
    "local_modules",
    "one_f_one_b",
    "one_f_one_b_order",
    "zero_bubble",
]
