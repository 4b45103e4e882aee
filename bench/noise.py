"""How quiet the machine was: the same little work again and again between the measurements, and the load.

A machine that does other things stretches it. What it took is kept with the results, and the report says so.
"""

import os
import time
from collections.abc import Sequence
from typing import NamedTuple

from .figures import summarize

LOOPS = 40_000
"""About 3 ms on a processor of 2024."""
QUIET = 0.05
"""Half of what lies between the 10th and the 90th percentile, relative to the median, of a quiet machine."""
LEAST = 5
"""Fewer calibrations than these tell nothing."""


class Verdict(NamedTuple):
    """Whether figures of a run may be trusted to a few per cent, and why not."""

    noisy: bool
    words: str


def calibrate() -> float:
    """Seconds that a fixed piece of arithmetic takes now, by the clock."""
    started = time.perf_counter()
    total = 0
    for number in range(LOOPS):
        total += number & 7
    return time.perf_counter() - started


def judge(calibrations: Sequence[float], loads: Sequence[float] = (), cpus: int | None = None) -> Verdict:
    """The verdict on a run, from its calibrations (seconds) and the load averages seen beside them."""
    reasons = []
    if len(calibrations) < LEAST:
        return Verdict(True, f"only {len(calibrations)} calibrations: nobody knows how quiet the machine was")
    summary = summarize(calibrations)
    words = f"the same arithmetic took {summary.median * 1e3:.2f} ms ± {summary.spread:.0%}"
    if summary.spread > QUIET:
        reasons.append(f"{words}, more than ± {QUIET:.0%}")
    processors = cpus or os.cpu_count() or 1
    if loads and (mean := sum(loads) / len(loads)) > processors + 0.5:
        reasons.append(f"load {mean:.1f} on {processors} processors")
    return Verdict(bool(reasons), "; ".join(reasons) or words)
