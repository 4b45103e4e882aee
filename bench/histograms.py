"""All samples of a run once more as an HDR histogram log, which the usual viewers read (hdrhistogram.org)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .records import Records

HOUR = 3_600_000_000_000
DIGITS = 3
HEAD = """\
#nanoseconds; made by python -m bench
#[Histogram log format version 1.3]
"StartTimestamp","Interval_Length","Interval_Max","Interval_Compressed_Histogram"
"""


def tag(text: str) -> str:
    """A key as the format takes it: no blanks, no commas."""
    return re.sub(r"[^\w.+%→/-]+", "_", text).strip("_")


def write(records: Records, path: Path) -> int:
    """One histogram, in nanoseconds, for each thing measured in seconds; how many there are."""
    from hdrh.histogram import HdrHistogram

    count = 0
    with path.open("w") as file:
        file.write(HEAD)
        for key, samples in records.samples.items():
            if records.units[key] != "s" or key in records.calculated:
                continue
            histogram = HdrHistogram(1, HOUR, DIGITS)
            for value in samples:
                histogram.record_value(min(HOUR, max(1, round(value * 1e9))))
            # the library's own writer leaves tags out
            name, largest = tag("/".join(map(str, key))), histogram.get_max_value()
            file.write(f"Tag={name},0.000,0.000,{largest:.3f},{histogram.encode().decode()}\n")
            count += 1
    return count
