"""The slots as user space sees them: whose each is, what it counts, and taking back those of backends that are gone.

Works on any writable memory of `SLOT.size * capacity` bytes; in the agent that is the kernel's own map. Programs fill
slots at any time, and add to them at any time while somebody can find them; user space writes only into slots that no
program can reach any more. Reading is copying: it makes no system call, takes no lock and clears nothing.

Slots are given out in ascending order first and in the order in which they were given back then.
"""

from collections.abc import Callable, Collection, Iterator, Set
from typing import NamedTuple

from .records import HIT_KEY, HITS_WORD, SLOT, SLOT_WORDS, HitKey, unpack_key

AHEAD = 1024
"""Slots looked at beyond the last one in use; more processors than this would have to lose a race for one key."""
REMEMBERED = 20_000
"""Backends that are gone and whose counts are remembered, should they come back; the oldest are forgotten."""


class Retired(NamedTuple):
    """A slot that no program finds any more, but in which one that found it before may still count."""

    slot: int
    key: HitKey


class SlotTable:
    """Totals by key. A total never falls: what a key had in a slot that was taken back is added to what it has now."""

    def __init__(self, memory: memoryview, capacity: int) -> None:
        self.capacity = capacity
        self._bytes = memoryview(memory)
        self._words = self._bytes.cast("Q")
        self._end = 0
        """Slots from here on have never been used."""
        self._keys: list[HitKey | None] = []
        """By slot, up to `_end`; None: free, retired, or being filled."""
        self._before: list[int] = []
        """What the key of a slot had counted before it got this slot."""
        self._last: list[int] = []
        """The counters at the last reading."""
        self._totals: dict[HitKey, int] = {}
        self._vacant: set[int] = set()
        """Slots before `_end` that may come into use."""
        self._retired: set[Retired] = set()
        self._remembered: dict[HitKey, int] = {}

    def __len__(self) -> int:
        """Slots in use as of the last reading."""
        return len(self._totals)

    def close(self) -> None:
        """Let go of the memory."""
        self._words.release()
        self._bytes.release()

    def read(self) -> dict[HitKey, int]:
        """Connections by the way they took, since the table began."""
        self._discover()
        counters = self._words[HITS_WORD : self._end * SLOT_WORDS : SLOT_WORDS].tolist()
        if counters != self._last:
            keys, before, totals = self._keys, self._before, self._totals
            for slot, (was, now) in enumerate(zip(self._last, counters, strict=True)):
                if was != now and (key := keys[slot]) is not None:
                    totals[key] = before[slot] + now
            self._last = counters
        found = self._totals.copy()
        for each in self._retired:
            if each.key in found:  # it came back, in another slot
                found[each.key] += self._counter(each.slot)
        return found

    def _counter(self, slot: int) -> int:
        return self._words[slot * SLOT_WORDS + HITS_WORD]

    def _discover(self) -> None:
        """Learn of slots that have come into use."""
        while self._end < self.capacity:
            end = min(self._end + AHEAD, self.capacity)
            if not any(self._words[self._end * SLOT_WORDS : end * SLOT_WORDS : SLOT_WORDS].tolist()):
                break
            fresh = end - self._end
            self._vacant.update(range(self._end, end))
            self._keys += [None] * fresh
            self._before += [0] * fresh
            self._last += [0] * fresh
            self._end = end
        for slot in [each for each in self._vacant if self._words[each * SLOT_WORDS]]:
            at = slot * SLOT.size
            key = unpack_key(bytes(self._bytes[at : at + HIT_KEY.size]))  # after the word that says it is complete
            self._keys[slot] = key
            self._before[slot] = self._totals[key] = self._remembered.get(key, 0)
            self._last[slot] = 0
            self._vacant.discard(slot)

    def others(self, keep: Collection[HitKey]) -> Iterator[tuple[int, HitKey]]:
        """Slots in use, as of the last reading, by other keys than these."""
        wanted = keep if isinstance(keep, Set) else set(keep)
        for slot, key in enumerate(self._keys):
            if key is not None and key not in wanted:
                yield slot, key

    def retire(self, slot: int) -> Retired:
        """No program finds this slot any more."""
        key = self._keys[slot]
        assert key is not None
        self._keys[slot] = None
        self._totals.pop(key)
        retired = Retired(slot, key)
        self._retired.add(retired)
        return retired

    def reclaim(self, retired: Retired, give_back: Callable[[int], None]) -> None:
        """No program counts in this slot any more: remember its count, empty it, and give it back to the programs."""
        slot, key = retired
        count = self._counter(slot)
        self._retired.discard(retired)
        self._remembered[key] = self._remembered.pop(key, 0) + count
        if key in self._totals:
            successor = self._keys.index(key)
            self._before[successor] += count
            self._totals[key] += count
        self._words[slot * SLOT_WORDS : (slot + 1) * SLOT_WORDS] = memoryview(bytes(SLOT.size)).cast("Q")
        self._last[slot] = 0
        self._vacant.add(slot)
        give_back(slot)
        if len(self._remembered) > REMEMBERED:
            self._forget()

    def _forget(self) -> None:
        """Drop the oldest tenth of what is remembered of those that have no slot."""
        gone = (key for key in self._remembered if key not in self._totals)
        for key, _ in zip([*gone], range(REMEMBERED // 10), strict=False):
            del self._remembered[key]
