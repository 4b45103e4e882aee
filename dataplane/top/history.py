"""Rates of the last minute, and the pictures of them: sparklines and charts of block characters.

Pure: the time comes with each look.
"""

import math
from array import array
from collections.abc import Iterable, Sequence

Key = tuple[str, ...]
"""Of what has a rate: () for everything, (label, VIP) of a Service, (label, VIP, endpoint) of a backend."""

SECONDS = 60
"""How far back it goes: a slot for each second."""

_BLOCKS = " ▁▂▃▄▅▆▇█"


class _Ring:
    """Hits of one key in each second of the minute that ends with the slot `newest`."""

    __slots__ = ("newest", "slots")

    def __init__(self, newest: int) -> None:
        self.newest = newest
        self.slots = array("d", bytes(8 * SECONDS))

    def add(self, newest: int, rate: float, parts: Iterable[tuple[int, float]]) -> None:
        """`rate` for so many seconds of each slot."""
        slots = self.slots
        for slot in range(max(self.newest + 1, newest - SECONDS + 1), newest + 1):
            slots[slot % SECONDS] = 0.0
        self.newest = newest
        for index, seconds in parts:
            slots[index] += rate * seconds

    def of(self, slot: int) -> float:
        """Hits in that second."""
        return self.slots[slot % SECONDS] if self.newest - SECONDS < slot <= self.newest else 0.0


class History:
    """Hits of the last minute by key, in slots of one second.

    A look tells the rate since the look before; whatever the interval, each second gets its part. What has had no hits
    for a minute costs nothing, so ten thousand idle Services are as cheap as none.

    One thread may take while another one reads: what is read is then of this look or of the one before.
    """

    def __init__(self) -> None:
        self._at: float | None = None
        self._newest = 0
        self._looked = _Ring(0)  # seconds of each slot that looks cover
        self._rings: dict[Key, _Ring] = {}

    def take(self, at: float, rates: Iterable[tuple[Key, float | None]]) -> None:
        """Rates per second between the look before and this one, at `at` seconds since the epoch.

        The first look, and one from before the last (somebody has set the clock back), only start the minute.
        """
        before, self._at = self._at, at
        newest = math.ceil(at) - 1
        if before is None or at <= before:
            self._looked = _Ring(newest)
            self._rings = {}
            self._newest = newest
            return
        start = max(before, newest - SECONDS + 1)
        parts = [
            (slot % SECONDS, min(at, slot + 1) - max(start, slot)) for slot in range(math.floor(start), newest + 1)
        ]
        rings = self._rings
        for key, rate in rates:
            if rate:
                ring = rings.get(key)
                if ring is None:
                    ring = rings[key] = _Ring(newest)
                ring.add(newest, rate, parts)
        self._looked.add(newest, 1.0, parts)
        self._newest = newest
        for key in [key for key, ring in rings.items() if ring.newest <= newest - SECONDS]:
            del rings[key]

    def cells(self, key: Key, width: int) -> list[float | None]:
        """Mean rates of at most `width` equal parts of the last minute, oldest first; None where nobody looked.

        The parts begin at whole multiples of their length, so that a picture moves on and does not shimmer.
        """
        if width < 1:
            return []
        length = math.ceil(SECONDS / width)
        oldest = self._newest - SECONDS + 1
        last = self._newest // length
        ring = self._rings.get(key)
        found: list[float | None] = []
        for cell in range(last - math.ceil(SECONDS / length) + 1, last + 1):
            slots = range(max(oldest, cell * length), min(self._newest, cell * length + length - 1) + 1)
            seconds = sum(map(self._looked.of, slots))
            if seconds <= 0:
                found.append(None)
            else:
                found.append(0.0 if ring is None else sum(map(ring.of, slots)) / seconds)
        return found

    def hits(self, key: Key) -> float:
        """Of the last minute."""
        ring = self._rings.get(key)
        if ring is None:
            return 0.0
        return sum(map(ring.of, range(self._newest - SECONDS + 1, self._newest + 1)))

    def peak(self, key: Key, width: int = SECONDS) -> float:
        """The highest of `cells`."""
        if key not in self._rings:
            return 0.0
        return max((value for value in self.cells(key, width) if value is not None), default=0.0)

    def __len__(self) -> int:
        """How many keys have had hits in the last minute."""
        return len(self._rings)


def sparkline(values: Sequence[float | None], top: float) -> str:
    """A character for each value: a blank for none, ▁ for 0, ▂ to ▇ for more, ▇ being `top`.

    The whole block is not used, so that a line does not run into the one above it.
    """
    return "".join(_BLOCKS[_eighths(value, top, 7)] for value in values)


def chart(values: Sequence[float | None], top: float, height: int) -> list[str]:
    """The same, `height` lines high, the top line first, up to the whole block. Anything above 0 differs from 0."""
    eighths = [_eighths(value, top, 8 * height) for value in values]
    return ["".join(_BLOCKS[min(8, max(0, each - 8 * line))] for each in eighths) for line in range(height - 1, -1, -1)]


def _eighths(value: float | None, top: float, most: int) -> int:
    if value is None:
        return 0
    if value <= 0 or top <= 0:
        return 1
    return 1 + max(1, min(most - 1, round(value / top * (most - 1))))
