"""What is too slow to be measured is calculated from what was, and says so."""

import math
from collections.abc import Mapping

STEEPEST = 2.5
"""Nothing measured here grows faster with the number of Services than with this power."""


def predict(known: Mapping[int, float], size: int) -> float:
    """Seconds at a size, from those at smaller ones: by the growth between the two largest, linear from one."""
    if not known:
        return 0.0
    sizes = sorted(known)
    largest = sizes[-1]
    power = 1.0
    if len(sizes) > 1 and known[sizes[-2]] > 0 and known[largest] > 0:
        power = math.log(known[largest] / known[sizes[-2]]) / math.log(largest / sizes[-2])
    return known[largest] * math.pow(size / largest, min(STEEPEST, max(1.0, power)))


def mark(contender: str, known: Mapping[int, float]) -> str:
    """The name of a row that was not measured."""
    sources = " and ".join(f"{size:,}" for size in sorted(known)[-2:])
    return f"{contender} (calculated from {sources})"
