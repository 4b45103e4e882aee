"""Which clients iptables' `recent` match remembers: /proc/net/xt_recent (net/netfilter/xt_recent.c).

An entry's age is told in jiffies, whose rate user space is not told. /proc/timer_list has both clocks: jiffies begin
300 seconds before they wrap at 2^32 (INITIAL_JIFFIES), so the two give the rate.
"""

import contextlib
import re
from pathlib import Path

from .model import Address, format_address

ROOT = Path("/proc/thread-self/net/xt_recent")
TIMER_LIST = Path("/proc/timer_list")
UNKNOWN_AGE = -1.0
_WRAP, _HEAD_START = 1 << 32, 300
_ENTRY = re.compile(r"^src=(\S+) .*?last_seen: (\d+)", re.MULTILINE)


def recall(name: str, client: Address) -> float | None:
    """Seconds since a list has last seen a client; None = it does not know it, `UNKNOWN_AGE` = nobody can tell."""
    try:
        text = (ROOT / name).read_text()
    except OSError:
        return None
    seen = last_seen(text, client)
    if seen is None:
        return None
    with contextlib.suppress(OSError):
        if clock := jiffies(TIMER_LIST.read_text()):
            now, rate = clock
            return max(0.0, (now - seen) / rate)
    return UNKNOWN_AGE


def last_seen(text: str, client: Address) -> int | None:
    """When a list has last seen a client, in jiffies."""
    name, full = format_address(client), client.hex()
    spelled = {name, ":".join(full[i : i + 4] for i in range(0, len(full), 4))}  # %pI6
    return next((int(seen) for source, seen in _ENTRY.findall(text) if source in spelled), None)


def jiffies(timer_list: str) -> tuple[int, float] | None:
    """Jiffies now, and how many make a second."""
    now, count = re.search(r"^now at (\d+) nsecs", timer_list, re.MULTILINE), re.search(r"jiffies: (\d+)", timer_list)
    if not (now and count):
        return None
    seconds, ticks = int(now[1]) / 1e9, int(count[1])
    # ticks = 2^32 - 300 rate + seconds * rate
    if abs(seconds - _HEAD_START) < 1:
        return None
    rate = (ticks - _WRAP) / (seconds - _HEAD_START)
    return (ticks, round(rate)) if 50 < rate < 2000 else None
