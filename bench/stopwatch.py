"""What a piece of work took, by the clock and of the processors: a busy machine stretches the former only."""

import resource
import time
from collections.abc import Callable
from typing import NamedTuple


class Spent(NamedTuple):
    """Seconds that passed, and seconds of processor time of this process and the children it has waited for."""

    wall: float
    cpu: float


def cpu() -> float:
    """Processor seconds so far."""
    some = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in some)


def measured(work: Callable[[], object]) -> Spent:
    """Do it, and say what it took."""
    began, used = time.perf_counter(), cpu()
    work()
    return Spent(time.perf_counter() - began, cpu() - used)
