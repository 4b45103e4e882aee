"""Statistics of samples: pure functions over lists of numbers."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Summary(NamedTuple):
    """What a table shows of many samples of one thing."""

    samples: int
    median: float
    p10: float
    p90: float
    p99: float

    @property
    def spread(self) -> float:
        """Half of what lies between p10 and p90, relative to the median: 0.05 reads as ±5 %."""
        return (self.p90 - self.p10) / 2 / self.median if self.median else 0.0


def quantile(samples: Sequence[float], share: float) -> float:
    """The sample below which `share` of the samples lie, interpolated between neighbours."""
    if not samples:
        raise ValueError("no samples")
    ordered = sorted(samples)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarize(samples: Sequence[float]) -> Summary:
    """Summary of at least one sample."""
    return Summary(
        len(samples),
        statistics.median(samples),
        quantile(samples, 0.1),
        quantile(samples, 0.9),
        quantile(samples, 0.99),
    )


def ratio(ours: Sequence[float], base: Sequence[float]) -> float:
    """Median against median; NaN when the base took no time at all."""
    below = statistics.median(base)
    return statistics.median(ours) / below if below else math.nan


def seconds(value: float) -> str:
    """A duration in the unit that reads best."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value / 1e-9:.0f} ns" if value else "0"
