"""The slots of the probe as user space reads them; here a plain piece of memory, written as the programs write it."""

import struct
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.bpf import slot_table
from dataplane.bpf.records import HITS_WORD, SLOT, HitKey, pack_frontend, pack_key, unpack_key
from dataplane.bpf.slot_table import Retired, SlotTable


def key(number: int) -> HitKey:
    return HitKey(6, bytes([10, 0, 1, 175]), 80, struct.pack("!I", 0x0AF40000 + number), 9376)


class Kernel:
    """What the programs do: give a key a slot, count in it."""

    def __init__(self, capacity: int) -> None:
        self.memory = bytearray(SLOT.size * capacity)
        self.free = list(range(capacity))
        self.ids: dict[HitKey, int] = {}
        self.table = SlotTable(memoryview(self.memory), capacity)

    def hit(self, what: HitKey) -> bool:
        """False: there is no slot left."""
        if what not in self.ids:
            if not self.free:
                return False
            self.ids[what] = self.free.pop(0)
            at = self.ids[what] * SLOT.size
            self.memory[at : at + len(pack_key(what))] = pack_key(what)
        self.add(self.ids[what])
        return True

    def add(self, slot: int) -> None:
        at = slot * SLOT.size + 8 * HITS_WORD
        struct.pack_into("=Q", self.memory, at, struct.unpack_from("=Q", self.memory, at)[0] + 1)

    def retire(self, keep: set[HitKey]) -> list[Retired]:
        self.table.read()
        gone = []
        for slot, what in self.table.others(keep):
            del self.ids[what]
            gone.append(self.table.retire(slot))
        return gone

    def reclaim(self, retired: Retired) -> None:
        self.table.reclaim([retired], self.free.append)


def test_keys_survive_packing() -> None:
    for one in (key(1), HitKey(17, bytes(range(16)), 53, bytes(range(16, 32)), 65535)):
        assert unpack_key(pack_key(one)) == one


def test_an_ipv4_address_is_followed_by_zeros() -> None:
    assert pack_frontend(6, b"\x0a\0\x01\xaf", 80) == b"\x02\x06\0\x50" + bytes(4) + b"\x0a\0\x01\xaf" + bytes(12)


def test_nothing_is_read_where_nothing_was_counted() -> None:
    assert Kernel(8).table.read() == {}


def test_totals_by_key() -> None:
    kernel = Kernel(8)
    for number in (1, 2, 1, 1):
        kernel.hit(key(number))
    assert kernel.table.read() == {key(1): 3, key(2): 1}
    kernel.hit(key(2))
    assert kernel.table.read() == {key(1): 3, key(2): 2}


def test_a_slot_whose_key_is_not_written_yet_is_read_later() -> None:
    kernel = Kernel(8)
    kernel.add(0)
    kernel.hit(key(1))
    kernel.memory[SLOT.size : 2 * SLOT.size] = kernel.memory[: SLOT.size]
    kernel.memory[0:40] = bytes(40)
    kernel.memory[SLOT.size + 8 * HITS_WORD] = 5
    assert kernel.table.read() == {key(1): 5}
    kernel.memory[0:40] = pack_key(key(2))
    assert kernel.table.read() == {key(1): 5, key(2): 2}


def test_reading_goes_as_far_as_slots_were_given_out() -> None:
    kernel = Kernel(3 * slot_table.AHEAD)
    for number in range(2 * slot_table.AHEAD + 1):
        kernel.hit(key(number))
    found = kernel.table.read()
    assert (len(found), set(found.values())) == (2 * slot_table.AHEAD + 1, {1})


def test_a_backend_that_comes_back_goes_on_where_it_was() -> None:
    kernel = Kernel(2)
    for _ in range(3):
        kernel.hit(key(1))
    kernel.hit(key(2))
    (retired,) = kernel.retire({key(2)})
    assert kernel.table.read() == {key(2): 1}
    kernel.add(0)  # a program had found the slot before
    kernel.reclaim(retired)
    kernel.hit(key(1))
    assert kernel.table.read() == {key(1): 5, key(2): 1}


def test_a_backend_that_comes_back_while_its_old_slot_is_in_use_loses_nothing() -> None:
    kernel = Kernel(4)
    kernel.hit(key(1))
    (first,) = kernel.retire(set())
    kernel.hit(key(1))
    kernel.add(first.slot)
    assert kernel.table.read() == {key(1): 3}
    (second,) = kernel.retire(set())
    kernel.hit(key(1))
    assert kernel.table.read() == {key(1): 4}
    for each in (first, second):
        kernel.reclaim(each)
        assert kernel.table.read() == {key(1): 4}


def test_what_is_remembered_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_table, "REMEMBERED", 20)
    kernel = Kernel(64)
    for number in range(30):
        kernel.hit(key(number))
        for each in kernel.retire({key(0)}):
            kernel.reclaim(each)
    assert len(kernel.table._remembered) <= 20
    kernel.hit(key(29))
    assert kernel.table.read() == {key(0): 1, key(29): 2}


GROWTH = """
import mmap, struct
from pathlib import Path
from dataplane.bpf.records import SLOT, HitKey, pack_key
from dataplane.bpf.slot_table import SlotTable

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

memory = mmap.mmap(-1, SLOT.size * 120_000)
for number in range(30_000):
    key = HitKey(6, struct.pack("!I", 0x0A600000 + number // 3), 80, struct.pack("!I", 0x0AF40000 + number), 9376)
    SLOT.pack_into(memory, SLOT.size * number, pack_key(key), 1_000_000 + number)
before = resident()
table = SlotTable(memoryview(memory), 120_000)
found = table.read()
assert len(found) == 30_000
print(resident() - before)
"""


def test_the_counters_of_30000_backends_take_less_than_12_mb() -> None:
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 12_000_000


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(["hit", "late", "retire", "reclaim", "read"]), st.integers(0, 5))))
def test_totals_never_fall_and_no_hit_is_lost(steps: list[tuple[str, int]]) -> None:
    kernel = Kernel(6)
    true: dict[HitKey, int] = {}
    seen: dict[HitKey, int] = {}
    waiting: list[Retired] = []
    for what, number in steps:
        if what == "hit" and kernel.hit(key(number)):
            true[key(number)] = true.get(key(number), 0) + 1
        elif what == "late" and waiting:
            late = waiting[number % len(waiting)]
            kernel.add(late.slot)
            true[late.key] += 1
        elif what == "retire":
            waiting += kernel.retire({key(number)})
        elif what == "reclaim" and waiting:
            kernel.reclaim(waiting.pop(0))
        else:
            found = kernel.table.read()
            assert found == {each: true[each] for each in kernel.ids}
            assert all(found[each] >= count for each, count in seen.items() if each in found)
            seen |= found
