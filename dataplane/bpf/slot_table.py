"""The slots as user space sees them: whose each is, what it counts, and taking back those of backends that are gone.

Works on any writable memory of `SLOT.size * capacity` bytes; in the agent that is the kernel's own map. Programs fill
slots at any time, and add to them at any time while somebody can find them; user space writes only into slots that no
program can reach any more. Reading is copying: it makes no system call, takes no lock and clears nothing.

Slots are given out in ascending order first and in the order in which they were given back then.
"""

from collections.abc import Callable, Collection, Set
from operator import add
from typing import NamedTuple, cast

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
        self._vacant: set[int] = set()
        """Slots before `_end` that may come into use."""
        self._retired: set[Retired] = set()
        self._remembered: dict[HitKey, int] = {}
        self._addresses: dict[bytes, bytes] = {}
        self._ports: dict[int, int] = {}
        """Each once, and shared by the keys that have it: it is a third of their memory."""

    def close(self) -> None:
        """Let go of the memory."""
        self._words.release()
        self._bytes.release()

    def read(self) -> dict[HitKey, int]:
        """Connections by the way they took, since the table began."""
        self._discover()
        counters = self._words[HITS_WORD : self._end * SLOT_WORDS : SLOT_WORDS].tolist()
        found = dict(zip(self._keys, map(add, self._before, counters), strict=True))
        found.pop(None, None)
        for each in self._retired:
            if each.key in found:  # it came back, in another slot
                found[each.key] += self._counter(each.slot)
        return cast("dict[HitKey, int]", found)

    def _counter(self, slot: int) -> int:
        return self._words[slot * SLOT_WORDS + HITS_WORD]

    def _discover(self) -> None:
        """Learn of slots that have come into use."""
        while self._end < self.capacity:
            end = min(self._end + AHEAD, self.capacity)
            if not any(self._words[self._end * SLOT_WORDS : end * SLOT_WORDS : SLOT_WORDS].tolist()):
                break
            fresh = range(self._end, end)
            self._keys += [None] * len(fresh)
            self._before += [0] * len(fresh)
            self._end = end
            self._vacant.update(each for each in fresh if not self._take(each))
        self._vacant.difference_update([each for each in self._vacant if self._take(each)])

    def _take(self, slot: int) -> bool:
        """Learn whose a slot is, if it is complete."""
        if not self._words[slot * SLOT_WORDS]:
            return False
        at = slot * SLOT.size
        found = unpack_key(bytes(self._bytes[at : at + HIT_KEY.size]))  # after the word that says it is complete
        key = found._replace(
            address=self._addresses.setdefault(found.address, found.address),
            port=self._ports.setdefault(found.port, found.port),
            backend_port=self._ports.setdefault(found.backend_port, found.backend_port),
        )
        self._keys[slot] = key
        self._before[slot] = self._remembered.get(key, 0)
        return True

    def others(self, keep: Collection[HitKey]) -> list[tuple[int, HitKey]]:
        """Slots in use, as of the last reading, by other keys than these."""
        wanted = keep if isinstance(keep, Set) else set(keep)
        return [(slot, key) for slot, key in enumerate(self._keys) if key is not None and key not in wanted]

    def retire(self, slot: int) -> Retired:
        """No program finds this slot any more."""
        key = self._keys[slot]
        assert key is not None
        self._keys[slot] = None
        retired = Retired(slot, key)
        self._retired.add(retired)
        return retired

    def reclaim(self, batch: Collection[Retired], give_back: Callable[[int], None]) -> None:
        """No program counts in these any more: remember their counts, empty them, give them back to the programs."""
        successors = {key: slot for slot, key in enumerate(self._keys) if key is not None}
        for each in batch:
            count = self._counter(each.slot)
            self._retired.discard(each)
            self._remembered[each.key] = self._remembered.pop(each.key, 0) + count
            if each.key in successors:
                self._before[successors[each.key]] += count
            self._words[each.slot * SLOT_WORDS : (each.slot + 1) * SLOT_WORDS] = _EMPTY
            self._vacant.add(each.slot)
            give_back(each.slot)
        if len(self._remembered) > REMEMBERED:
            gone = [key for key in self._remembered if key not in successors]
            for key in gone[: len(self._remembered) - REMEMBERED]:
                del self._remembered[key]


_EMPTY = memoryview(bytes(SLOT.size)).cast("Q")
